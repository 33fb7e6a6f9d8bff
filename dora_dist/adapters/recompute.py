"""Products that activation checkpointing keeps instead of computing them a second time.

Checkpointing throws away what a segment saves for backward, and runs the segment's forward again when backward needs
it. Of a layer with `keeps_products` the products with its weights are kept, and a recomputation takes them: it then
needs none of the layer's parameters, and no engine gathers them for it. Which forward a recomputation repeats must be
certain, so torch's own pairing decides: its non-reentrant `checkpoint` makes one pair of contexts per segment call,
around the forward and around every recomputation of exactly this forward.

    checkpoint(segment, x, use_reentrant=False, context_fn=keeping_products)

Without `context_fn`, and with reentrant checkpointing, which has none, nothing is kept and everything is recomputed.
"""

import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor

Products = tuple[Tensor | None, ...]


class Keeps(Protocol):
    keeps_products: bool


class _Here(threading.local):
    """Of a thread: backward, and so a recomputation, runs in threads of its own."""

    segment: "_Segment | None" = None


_here = _Here()


def keeping_products() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of one segment call, around its forward and around its recomputations: checkpoint's `context_fn`."""
    calls: Calls = {}
    return _Keeping(calls), _Recomputing(calls)


def kept_products(layer: Keeps, compute: Callable[[], Products]) -> Products:
    """`compute()`, or what it gave in the forward that is being recomputed."""
    if _here.segment is None or not layer.keeps_products:
        return compute()
    return _here.segment.products(layer, compute)


def has_kept_products(layer: object) -> bool:
    """Whether the layer's next call is one of a recomputation that finds its products."""
    return _here.segment is not None and _here.segment.has(layer)


class _Kept(NamedTuple):
    products: Products
    writes: int
    """`_writes` when they were made."""


def _writes(products: Products) -> int:
    """How often products have been written to in place, which autograd allows where they have no gradient."""
    return sum(p._version for p in products if p is not None and not p.is_inference())


Calls = dict[object, list[_Kept | None]]
"""What is kept of each layer, one entry per call, in the order of its calls."""


class _Segment(AbstractContextManager[None]):
    """A segment's forward or recomputation.

    A recomputation makes the calls of the forward in the same order: checkpointing relies on that itself.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @abstractmethod
    def products(self, layer: object, compute: Callable[[], Products]) -> Products: ...

    def has(self, layer: object) -> bool:
        return False

    def __enter__(self) -> None:
        self._outer = _here.segment  # of a checkpoint around this one
        _here.segment = self

    def __exit__(self, *_: object) -> None:
        _here.segment = self._outer


class _Keeping(_Segment):
    def products(self, layer: object, compute: Callable[[], Products]) -> Products:
        products = compute()
        self._calls.setdefault(layer, []).append(_Kept(products, _writes(products)))
        return products


class _Recomputing(_Segment):
    """Entered once for each recomputation: several times where backward runs again over a retained graph."""

    def __enter__(self) -> None:
        super().__enter__()
        self._done: Counter[object] = Counter()

    def has(self, layer: object) -> bool:
        return self._kept(layer) is not None

    def products(self, layer: object, compute: Callable[[], Products]) -> Products:
        products = self._kept(layer)
        self._calls[layer][self._done[layer]] = None  # handed on: memory is held no longer than without keeping
        self._done[layer] += 1
        return compute() if products is None else products

    def _kept(self, layer: object) -> Products | None:
        """Of the layer's next call, if they are still there and as they were made."""
        calls, call = self._calls.get(layer, []), self._done[layer]
        kept = calls[call] if call < len(calls) else None
        return kept.products if kept is not None and kept.writes == _writes(kept.products) else None
