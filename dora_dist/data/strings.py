"""Many strings in two tensors: a cache can hold them, and loader processes share them without copies.

(A list of strings would be copied page by page in every forked process: reading an object writes its count of
references.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

_ERRORS = "surrogatepass"  # JSON can name a file by half a character


def pack(strings: Sequence[str]) -> tuple[Tensor, Tensor]:
    """UTF-8 bytes of all strings (uint8), and where each starts and the last ends (n + 1, int64)."""
    encoded = [string.encode(errors=_ERRORS) for string in strings]
    joined = bytearray().join(encoded)
    text = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    return text, torch.tensor([0, *accumulate(map(len, encoded))])


def unpack(text: Tensor, starts: Tensor, first: int = 0, stop: int | None = None) -> list[str]:
    """Strings number `first` up to `stop` of what `pack` made; None: up to the last."""
    bounds = starts[first : None if stop is None else stop + 1].tolist()
    joined = text[bounds[0] : bounds[-1]].numpy().tobytes()
    return [joined[a - bounds[0] : b - bounds[0]].decode(errors=_ERRORS) for a, b in pairwise(bounds)]
