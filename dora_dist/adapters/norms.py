"""Row norms n of V' = W0 + ΔW, without ever building an (out, in) temporary.

n² is rowsum(W0²), which never changes and is computed once, plus 2·rowsum(W0⊙ΔW) + rowsum(ΔW²), which the method
says (`row_products`, and `row_squares` for their sum): for LoRA, with A (in, r) and B (out, r),

    n² = rowsum(W0²) + 2s·rowsum((W0·A)⊙B) + s²·rowsum((B·(AᵀA))⊙B)

Each term is a sum over elements of W0 (the last is charged to a row's first element), so partial sums over any
pieces of W0 add up. A whole weight is the piece [0, out·in); a ZeRO-3 shard is another. All sums are fp32.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_dist.adapters.layer import AdaptedLinear, before_any_forward
from dora_dist.adapters.pieces import WeightPiece, blocks, whole_piece
from dora_dist.adapters.row_changes import RowChange
from dora_dist.runtime.stopwatch import Stopwatch


def add_base_squares(layer: AdaptedLinear, piece: WeightPiece, sums: Tensor) -> None:
    """Add the piece's share of rowsum(W0²) to `sums` (out,), fp32, in place."""
    for block, w in blocks(layer, piece, sums.device):
        sums[block.row : block.row + block.rows] += w.square().sum(1)


def add_update_sums(
    layer: AdaptedLinear, piece: WeightPiece, *, change: Tensor | None = None, products: Tensor | None = None
) -> None:
    """Add the piece's share of n² − rowsum(W0²) to `change` (out,), and of rowsum(W0⊙ΔW) and rowsum(ΔW²) to `products`
    (2, out), where they are given, fp32, in place; what ΔW depends on must be whole. Each block is decoded once.
    """
    of_layer, method = (layer.shape, layer.adapter_parameters()), layer.method
    squares_of = None if change is None else method.row_squares(*of_layer)
    products_of = None if products is None else method.row_products(*of_layer)
    if squares_of is None and products_of is None:
        return
    device = next(sums.device for sums in (change, products) if sums is not None)
    for block, w in blocks(layer, piece, device):
        rows = slice(block.row, block.row + block.rows)
        if squares_of is not None and change is not None:
            change[rows] += squares_of(w, block.row, block.col)
        if products_of is not None and products is not None:
            for own, found in zip(products, products_of(w, block.row, block.col), strict=True):
                own[rows] += found


def magnitude_offset(layer: AdaptedLinear) -> Tensor | None:
    """A copy of m − ‖W0‖ (out,), fp32, of a layer whose magnitude is whole here; None if it trains none."""
    name = layer.method.magnitude
    return None if name is None else layer.adapter_parameters()[name].detach().float().clone()


class RowSums(NamedTuple):
    """What one pass over a layer's weight finds, fp32, the same on every process."""

    change: Tensor | None
    """What n² has beyond rowsum(W0²) (out,); None for a layer whose function has no norms."""
    products: Tensor | None = None
    """rowsum(W0⊙ΔW) and rowsum(ΔW²) (2, out), where they are asked for."""
    magnitude_offset: Tensor | None = None


class NormRefresher:
    """Keeps every AdaptedLinear's `norm` equal to ‖V'‖ of its present parameters, for weights held whole.

    Attached to a model, it recomputes before the first forward that follows an optimizer step, whoever takes that
    step, and whether the root or an inner module is called: any torch optimizer's step marks the norms stale, the next
    forward refreshes them. Gradient accumulation, evaluation and activation recompute therefore never do. Code that
    writes adapter parameters by hand calls `mark_stale()` on every rank.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLinear)]
        self.layers: dict[str, AdaptedLinear] = {n: m for n, m in named if m.method.weight_decomposed}
        self.device = next(model.parameters()).device
        self.refreshes = 0
        self.bytes_received = 0  # from other ranks; weights held whole need none
        self.stopwatch = Stopwatch()
        self._stale = True
        self._base_squares: dict[str, Tensor] = {}
        self._handles = [*before_any_forward(model, self._refresh_if_stale), _mark_on_optimizer_step(self)]

    def mark_stale(self) -> None:
        """Say that adapter parameters have changed; the next forward recomputes the norms."""
        self._stale = True

    def close(self) -> None:
        """Detach from the model and from optimizers."""
        for handle in self._handles:
            handle.remove()

    def refresh(self) -> None:
        """Recompute every layer's norm now. On shards this is collective."""
        self.record({})

    @torch.no_grad()
    def record(self, recorded: Mapping[str, AdaptedLinear]) -> dict[str, RowChange]:
        """Refresh, and say how the rows of the layers `recorded` have changed, out of the same pass over the weights.

        These may be any layers of the model, also ones whose function has no norms. On shards this is collective.
        """
        self._find_base_squares({**self.layers, **recorded})
        changes = {}
        with self.stopwatch.on(self.device):
            for name, sums in self.row_sums(recorded):
                base = self._base_squares[name]
                if sums.change is not None:
                    self.layers[name].norm = (base + sums.change).clamp_(min=0.0).sqrt_()
                if sums.products is not None:
                    cross, squares = sums.products
                    changes[name] = RowChange(base, cross, squares, sums.magnitude_offset)
        self._stale = False
        self.refreshes += 1
        return changes

    def _find_base_squares(self, layers: Mapping[str, AdaptedLinear]) -> None:
        new = {name: layer for name, layer in layers.items() if name not in self._base_squares}
        if not new:
            return
        self._base_squares |= self.base_squares(new)
        for name in self.layers.keys() & new.keys():
            self.layers[name].base_norm = self._base_squares[name].sqrt()

    def base_squares(self, layers: Mapping[str, AdaptedLinear]) -> dict[str, Tensor]:
        """rowsum(W0²) of each layer, (out,) fp32."""
        result = {}
        for name, layer in layers.items():
            piece = whole_piece(layer)
            result[name] = _zeros(layer, piece.tensors[0].device)
            add_base_squares(layer, piece, result[name])
        return result

    def row_sums(self, recorded: Mapping[str, AdaptedLinear]) -> Iterator[tuple[str, RowSums]]:
        """What changes the norms of `layers`, 0 for magnitude-only modules, and the products of those `recorded`."""
        for name, layer in {**self.layers, **recorded}.items():
            piece = whole_piece(layer)
            device = piece.tensors[0].device
            change = _zeros(layer, device) if name in self.layers else None
            products = torch.stack([_zeros(layer, device)] * 2) if name in recorded else None
            add_update_sums(layer, piece, change=change, products=products)
            yield name, RowSums(change, products, magnitude_offset(layer) if name in recorded else None)

    def _refresh_if_stale(self) -> None:
        if self._stale:
            self.refresh()


def _zeros(layer: AdaptedLinear, device: torch.device) -> Tensor:
    return torch.zeros(layer.out_features, dtype=torch.float32, device=device)


def _mark_on_optimizer_step(refresher: NormRefresher) -> Any:
    # Through a weak reference: the hook is process-wide and must not keep a finished run's model alive.
    reference: Callable[[], NormRefresher | None] = weakref.ref(refresher)

    def hook(*_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive.mark_stale()

    return register_optimizer_step_post_hook(hook)
