"""Importance from ZeRO-3 shards: partial Gram sums where the factors are, one all-reduce for the whole model.

A flat shard of an (in, r) or (out, r) factor holds whole rows, whose outer products add up over ranks; a row that a
shard boundary cuts is put together in the same all-reduce, and added by every rank afterwards.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dora_dist.adapters.components import ComponentPruner, FactorSums, LayerSums, component_parameters
from dora_dist.zero3.optimizer_state import read_state, zero_elements
from dora_dist.zero3.partition import boundaries, full_numel, full_shape, local_range
from dora_dist.zero3.state_names import MASTER, MOMENTS


class ShardedComponentPruner(ComponentPruner):
    """A ComponentPruner over shards: `settle` is collective, on every rank and in the same order.

    Sums are taken of the fp32 masters, in fp64; every rank computes the same scores from the same reduced bits.
    """

    def layer_sums(self) -> dict[str, LayerSums]:
        slots = [_Slots.of(name, *component_parameters(layer)) for name, layer in self.layers.items()]
        flat = torch.zeros(
            sum(s.numel for s in slots), dtype=torch.float64, device=get_accelerator().current_device_name()
        )
        for slot, part in _parts(slots, flat):
            _fill(slot, part)
        dist.all_reduce(flat)
        return {slot.name: _read(slot, part) for slot, part in _parts(slots, flat.cpu())}

    def zero_gates(self, name: str, pruned: Tensor, clear_moments: bool) -> None:
        _, _, gates = component_parameters(self.layers[name])
        zero_elements(gates, pruned, MOMENTS if clear_moments else ())


class _Factor(NamedTuple):
    """A factor's place in the buffer: gram (r, r), total (r,), then its cut rows (len(cut), r)."""

    parameter: nn.Parameter
    rows: int
    r: int
    cut: tuple[int, ...]

    @classmethod
    def of(cls, parameter: nn.Parameter) -> "_Factor":
        rows, r = full_shape(parameter)
        cuts = boundaries(parameter)
        return cls(parameter, rows, r, tuple(sorted({cut // r for cut in cuts if cut % r})))

    @property
    def numel(self) -> int:
        return (self.r + 1 + len(self.cut)) * self.r


class _Slots(NamedTuple):
    """A layer's place in the buffer: its gates, then both factors."""

    name: str
    gates: nn.Parameter
    r: int
    A: _Factor
    B: _Factor

    @classmethod
    def of(cls, name: str, lora_A: nn.Parameter, lora_B: nn.Parameter, gates: nn.Parameter) -> "_Slots":
        return cls(name, gates, full_numel(gates), _Factor.of(lora_A), _Factor.of(lora_B))

    @property
    def numel(self) -> int:
        return self.r + self.A.numel + self.B.numel

    def split(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The views of `part` that are the gates' (r,), A's and B's (rows, r)."""
        gates, a, b = part.split([self.r, self.A.numel, self.B.numel])
        return gates, a.view(-1, self.r), b.view(-1, self.r)


def _parts(slots: list[_Slots], flat: Tensor) -> Iterator[tuple[_Slots, Tensor]]:
    return zip(slots, flat.split([slot.numel for slot in slots]), strict=True)


def _fill(slot: _Slots, part: Tensor) -> None:
    """Write what this rank holds of a layer into its part of the buffer."""
    gates, a, b = slot.split(part)
    start, stop = local_range(slot.gates)
    gates[start:stop] = read_state(slot.gates, MASTER)
    for factor, view in ((slot.A, a), (slot.B, b)):
        _fill_factor(factor, view)


def _fill_factor(factor: _Factor, view: Tensor) -> None:
    r = factor.r
    start, stop = local_range(factor.parameter)
    local = read_state(factor.parameter, MASTER)
    first, last = -(-start // r), stop // r  # whole rows [first, last)
    if first < last:
        whole = local[first * r - start : last * r - start].view(-1, r).double()
        view[:r] = whole.t() @ whole
        view[r] = whole.sum(0)
    for place, row in enumerate(factor.cut):
        begin, end = max(start, row * r), min(stop, (row + 1) * r)
        if begin < end:
            view[r + 1 + place, begin - row * r : end - row * r] = local[begin - start : end - start]


def _read(slot: _Slots, part: Tensor) -> LayerSums:
    gates, a, b = slot.split(part)
    return LayerSums(gates, _read_factor(slot.A, a), _read_factor(slot.B, b))


def _read_factor(factor: _Factor, view: Tensor) -> FactorSums:
    r, cut = factor.r, view[factor.r + 1 :]
    return FactorSums(view[:r] + cut.t() @ cut, view[r] + cut.sum(0), factor.rows)
