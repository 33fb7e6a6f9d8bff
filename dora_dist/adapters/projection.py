"""The pair of frozen random matrices that VeRA's layers share: drawn from a key, kept once, never saved.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024 (arXiv 2310.11454), section 3. The numbers are
those that PEFT draws, bit for bit, so an adapter folder needs none of them.
"""

import hashlib
import math
from collections.abc import Collection
from functools import cached_property

import torch
from torch import Tensor

from dora_dist.runtime.errors import UserError

KEYS = range(-(2**63), 2**63)
"""Seeds that torch's generators take."""


class Projection:
    """A (r, widest in) and B (widest out, r) for all layers of a model; one of (out, in) uses A[:, :in] and B[:out].

    Every process draws the same numbers from `key`, on the CPU, when they are first asked for. They live as long as
    what holds this object: a model's layers.
    """

    def __init__(self, key: int, r: int, widest: tuple[int, int]) -> None:
        """widest: the most output and the most input features of the layers."""
        self.key, self.r, self.widest = key, r, widest
        self._pairs: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._grams: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def over(cls, shapes: Collection[tuple[int, int]], *, key: int, r: int) -> "Projection":
        """The pair for layers of these shapes (out, in)."""
        outs, ins = zip(*shapes, strict=True)
        return cls(key, r, (max(outs), max(ins)))

    def drawn(self) -> tuple[Tensor, Tensor]:
        """A and B in fp32 on the CPU, drawn again: U(−b, b) with b = √(6 / fan_in), A first."""
        out_features, in_features = self.widest
        generator = torch.Generator("cpu").manual_seed(self.key)
        A = torch.empty(self.r, in_features, dtype=torch.float32).uniform_(*_bounds(in_features), generator=generator)
        B = torch.empty(out_features, self.r, dtype=torch.float32).uniform_(*_bounds(self.r), generator=generator)
        return A, B

    @cached_property
    def digest(self) -> str:
        """A short text that differs where the numbers do: with other sizes, and should torch draw others one day."""
        content = hashlib.sha256()
        for matrix in self.drawn():
            content.update(matrix.view(-1).numpy().data)
        return content.hexdigest()[:16]

    def check(self, digest: str, whose: str) -> None:
        """Raise UserError unless `digest`, of what `whose` vectors were trained with, is of these; "" is not known."""
        if digest and digest != self.digest:
            raise UserError(
                f"{whose}: its vectors were trained with other shared matrices ({digest}) than those that torch "
                f"{torch.__version__} draws for projection_prng_key={self.key} and layers of up to {self.widest} "
                f"({self.digest}); use the torch, base and adapter.target_modules that it was trained with"
            )

    def views(self, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a layer of `shape` (out, in), in the dtype and on the device of `like`.

        Views: layers share the memory.
        """
        where = (like.device, like.dtype)
        if where not in self._pairs:
            A, B = self.drawn()
            self._pairs[where] = (A.to(*where), B.to(*where))
        A, B = self._pairs[where]
        return A[:, : shape[1]], B[: shape[0]]

    def gram(self, in_features: int, like: Tensor) -> Tensor:
        """A·Aᵀ (r, r) of a layer's A in `like`'s dtype, summed in fp32; kept, as few sizes occur."""
        where = (in_features, like.device, like.dtype)
        if where not in self._grams:
            A = self.views((0, in_features), like)[0].float()
            self._grams[where] = A @ A.t()
        return self._grams[where]


def _bounds(fan_in: int) -> tuple[float, float]:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in))  # in this order: the last bit counts
    return -bound, bound
