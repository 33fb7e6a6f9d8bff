"""Outputs that activation checkpointing keeps instead of computing them a second time.

Checkpointing throws away what a segment saves for backward, and runs the segment's forward again when backward needs
it. Of a layer whose output is small relative to the FLOPs behind it (down_proj), keeping the output costs little
memory and spares the second product. Which forward a recomputation repeats must be certain, so torch's own pairing
decides: its non-reentrant `checkpoint` makes one pair of contexts per segment call, around the forward and around
every recomputation of exactly this forward.

    checkpoint(segment, x, use_reentrant=False, context_fn=keeping_outputs)

Without `context_fn`, and with reentrant checkpointing, which has none, nothing is kept and everything is recomputed.
"""

import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor


class _Here(threading.local):
    """Of a thread: backward, and so a recomputation, runs in threads of its own."""

    segment: "_Segment | None" = None


_here = _Here()


def keeping_outputs() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of one segment call, around its forward and around its recomputations: checkpoint's `context_fn`."""
    outputs: dict[object, list[Tensor | None]] = {}
    return _Keeping(outputs), _Recomputing(outputs)


def kept_output(layer: object, compute: Callable[[], Tensor]) -> Tensor:
    """`compute()`, or what it gave in the forward that is being recomputed."""
    return compute() if _here.segment is None else _here.segment.output(layer, compute)


class _Segment(AbstractContextManager[None]):
    """A segment's forward or recomputation; `outputs` has each layer's, one per call, in the order of its calls.

    A recomputation makes the calls of the forward in the same order: checkpointing relies on that itself.
    """

    def __init__(self, outputs: dict[object, list[Tensor | None]]) -> None:
        self._outputs = outputs

    @abstractmethod
    def output(self, layer: object, compute: Callable[[], Tensor]) -> Tensor: ...

    def __enter__(self) -> None:
        self._outer = _here.segment  # of a checkpoint around this one
        _here.segment = self

    def __exit__(self, *_: object) -> None:
        _here.segment = self._outer


class _Keeping(_Segment):
    def output(self, layer: object, compute: Callable[[], Tensor]) -> Tensor:
        output = compute()
        self._outputs.setdefault(layer, []).append(output)
        return output


class _Recomputing(_Segment):
    """Entered once for each recomputation: several times where backward runs again over a retained graph."""

    def __enter__(self) -> None:
        super().__enter__()
        self._calls: Counter[object] = Counter()

    def output(self, layer: object, compute: Callable[[], Tensor]) -> Tensor:
        outputs, call = self._outputs[layer], self._calls[layer]
        self._calls[layer] += 1
        output, outputs[call] = outputs[call], None  # handed on: memory is held no longer than without keeping
        return compute() if output is None else output
