"""MoRA: Jiang et al., "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning" (arXiv 2405.12130).

ΔW·x = decompress(M·compress(x)): one trained square matrix M (r̂, r̂) between two operators without parameters. With
r̂ = ⌊√((in + out)·r)⌋ it has as many numbers as LoRA's factors of rank r, and ΔW a rank of up to r̂. Features are cut
into groups of r̂; the last group of inputs is filled up with zeros, the last one of outputs is cut off.

    type 1, sharing (equation 6)     compress sums the groups of inputs, decompress repeats: every tile of ΔW is M
    type 6, rotation (equation 9)    outputs of group a see inputs of group b = a mod n alone (n groups of inputs),
                                     rotated as positions are in RoPE: that tile of ΔW is M·R_b, the others are 0

R_b turns the pairs (q, q + r̂/2) by the angle b·10000^(−2q/r̂), so type 6 has an even r̂. The authors' code rounds r̂ to
the nearest integer, and fills up the last group with the first inputs in place of zeros.

Products of a layer for t tokens, forward, and twice as many backward: type 1 t·r̂², which is LoRA's t·r·(in + out), and
the least where each trained number meets each token; type 6 t·r̂·(inputs that are seen), n times as many. Row norms read
W0 once: an addition for each of its numbers (type 1), or a product for r̂ of each row (type 6). ΔW is never built:
temporaries are (t, r̂), and for type 6 the rotated tiles, (in, r̂).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dora_dist.adapters.method import Initial, Layer, MergeRows, RowProducts, Shape, Tensors, Update, register
from dora_dist.adapters.pieces import CHUNK_ELEMENTS
from dora_dist.runtime.errors import UserError

MATRIX = "mora_M"


class Stripe(NamedTuple):
    """Rows [first, last) of a block that lie in one group of outputs, and the rows of M (a slice) that they have."""

    first: int
    last: int
    group: int
    own: slice


@dataclass(frozen=True)
class Pattern(ABC):
    """How M fills a ΔW of `shape` (out, in); `size` is r̂. Arguments `m` are M's rows, or those of a stripe."""

    shape: Shape
    size: int

    @staticmethod
    @abstractmethod
    def size_of(shape: Shape, r: int) -> int:
        """r̂ for LoRA's rank r."""

    @abstractmethod
    def down(self, x_ti: Tensor) -> Tensor:
        """What `add_up` and `gradients` need of the inputs."""

    @abstractmethod
    def add_up(self, hidden: Tensor, m: Tensor, y_to: Tensor) -> None:
        """y += ΔW·x in place."""

    @abstractmethod
    def gradients(self, hidden: Tensor, m: Tensor, grad_to: Tensor) -> tuple[Tensor, Tensor]:
        """M's gradient, fp32, and what `add_input_gradient` needs."""

    @abstractmethod
    def add_input_gradient(self, grad_hidden: Tensor, m: Tensor, onto: Tensor) -> None:
        """onto (t, in) += the inputs' gradient, in place."""

    @abstractmethod
    def compress(self, rows: Tensor, group: int, col: int) -> Tensor:
        """Columns from `col` on of rows of one group of outputs -> (rows, r̂): C with ⟨row, ΔW's row⟩ = ⟨C, M's row⟩."""

    @abstractmethod
    def add_expanded(self, m: Tensor, group: int, rows: Tensor) -> None:
        """Add ΔW's rows of one group of outputs to `rows` (rows, in), in place: the transpose of `compress`."""

    @abstractmethod
    def gram(self, m: Tensor, group: int) -> Tensor:
        """`compress` of ΔW's rows of one group of outputs (rows, r̂)."""

    def stripes(self, row: int, rows: int) -> Iterator[Stripe]:
        """Cut rows [row, row + rows) where groups of outputs begin."""
        position, stop = row, row + rows
        while position < stop:
            group, offset = divmod(position, self.size)
            end = min(stop, (group + 1) * self.size)
            yield Stripe(position - row, end - row, group, slice(offset, offset + end - position))
            position = end


class Sharing(Pattern):
    """Type 1: every tile is M."""

    @staticmethod
    def size_of(shape: Shape, r: int) -> int:
        return max(1, math.isqrt(sum(shape) * r))

    def down(self, x_ti: Tensor) -> Tensor:
        return _fold(x_ti, self.size)

    def add_up(self, hidden: Tensor, m: Tensor, y_to: Tensor) -> None:
        _add_repeated(y_to, hidden @ m.t())

    def gradients(self, hidden: Tensor, m: Tensor, grad_to: Tensor) -> tuple[Tensor, Tensor]:
        folded = _fold(grad_to, self.size)
        return (folded.t() @ hidden).float(), folded @ m

    def add_input_gradient(self, grad_hidden: Tensor, m: Tensor, onto: Tensor) -> None:
        _add_repeated(onto, grad_hidden)

    def compress(self, rows: Tensor, group: int, col: int) -> Tensor:
        offset = col % self.size
        head = rows[:, : self.size - offset]
        folded = _fold(rows[:, head.shape[1] :], self.size)
        folded[:, offset : offset + head.shape[1]] += head
        return folded

    def add_expanded(self, m: Tensor, group: int, rows: Tensor) -> None:
        _add_repeated(rows, m)

    def gram(self, m: Tensor, group: int) -> Tensor:
        groups, rest = divmod(self.shape[1], self.size)
        own = m * groups
        own[:, :rest] += m[:, :rest]
        return own


class Rotation(Pattern):
    """Type 6: one tile for each group of outputs, M·R_b over the inputs of group b; M·R_b is M's rows turned by −b."""

    @staticmethod
    def size_of(shape: Shape, r: int) -> int:
        return max(2, math.isqrt(sum(shape) * r) // 2 * 2)

    def down(self, x_ti: Tensor) -> Tensor:
        return x_ti

    def add_up(self, hidden: Tensor, m: Tensor, y_to: Tensor) -> None:
        for tile, inputs, first, repeats in self._tiles(m):
            seen = hidden[:, inputs]
            if not repeats:
                y_to[:, first].addmm_(seen, tile.t())
                continue
            product = seen @ tile.t()
            for outputs in (first, *repeats):
                y_to[:, outputs] += product[:, : _length(outputs)]

    def gradients(self, hidden: Tensor, m: Tensor, grad_to: Tensor) -> tuple[Tensor, Tensor]:
        grads = m.new_zeros((self._used, *m.shape), dtype=torch.float32)
        for group, (inputs, first, repeats) in enumerate(self._seen()):
            folded = _folded(grad_to, first, repeats)
            grads[group, : _length(first), : _length(inputs)] = folded.t() @ hidden[:, inputs]
        return self._turned(grads, range(self._used)).sum(0), grad_to

    def add_input_gradient(self, grad_hidden: Tensor, m: Tensor, onto: Tensor) -> None:
        for tile, inputs, first, repeats in self._tiles(m):
            onto[:, inputs].addmm_(_folded(grad_hidden, first, repeats), tile)

    def compress(self, rows: Tensor, group: int, col: int) -> Tensor:
        inputs = self._inputs(group)
        start, stop = max(inputs.start, col), min(inputs.stop, col + rows.shape[1])
        seen = rows.new_zeros(len(rows), self.size)
        if start < stop:
            seen[:, start - inputs.start : stop - inputs.start] = rows[:, start - col : stop - col]
        return self._turned(seen, group % self._groups)

    def add_expanded(self, m: Tensor, group: int, rows: Tensor) -> None:
        inputs = self._inputs(group)
        rows[:, inputs] += self._turned(m, group % self._groups, back=True)[:, : _length(inputs)]

    def gram(self, m: Tensor, group: int) -> Tensor:
        width = _length(self._inputs(group))
        if width == self.size:
            return m
        own = self._turned(m, group % self._groups, back=True)
        own[:, width:] = 0
        return self._turned(own, group % self._groups)

    @property
    def _groups(self) -> int:
        """n, of inputs."""
        return -(-self.shape[1] // self.size)

    @property
    def _used(self) -> int:
        """Groups of inputs that an output sees: not all of them where there are fewer outputs than inputs."""
        return min(self._groups, -(-self.shape[0] // self.size))

    def _inputs(self, group: int) -> slice:
        """What a group of outputs sees."""
        first = group % self._groups * self.size
        return slice(first, min(first + self.size, self.shape[1]))

    def _seen(self) -> Iterator[tuple[slice, slice, list[slice]]]:
        """Of each group of inputs that is used: its columns, those of the first outputs that see it, and of the others.

        The first ones are r̂, unless they are the layer's last.
        """
        columns = [slice(first, min(first + self.size, self.shape[0])) for first in range(0, self.shape[0], self.size)]
        for group in range(self._used):
            first, *repeats = columns[group :: self._groups]
            yield self._inputs(group), first, repeats

    def _tiles(self, m: Tensor) -> Iterator[tuple[Tensor, slice, slice, list[slice]]]:
        """M·R_b, as far as inputs and outputs go, in M's dtype, with what `_seen` says; rotated in fp32 at least."""
        exact = m if m.dtype == torch.float64 else m.float()
        tiles = self._turned(exact[None], range(self._used), back=True).to(m.dtype)
        for tile, (inputs, first, repeats) in zip(tiles, self._seen(), strict=True):
            yield tile[: _length(first), : _length(inputs)], inputs, first, repeats

    def _turned(self, m: Tensor, groups: int | range, back: bool = False) -> Tensor:
        """R_b of the last dimension, or R_bᵀ (`back`): for one group, or for a range of them along the first."""
        cos, sin = _angles(self.size, self._groups, m.device, m.dtype)
        which = groups if isinstance(groups, int) else slice(groups.start, groups.stop)
        cos, sin = cos[which, ..., :], sin[which, ..., :]
        if isinstance(groups, range):
            cos, sin = cos[:, None], sin[:, None]
        if back:
            sin = -sin
        one, two = m.chunk(2, dim=-1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


PATTERNS: dict[int, type[Pattern]] = {1: Sharing, 6: Rotation}


@register
@dataclass(frozen=True)
class Mora(Update):
    """The update of one square matrix, `mora_M` (r̂, r̂), which starts at 0.

    `r` is the rank of a LoRA with as many numbers; `type` is 1 (sharing, for large r) or 6 (rotation, for small r), as
    the authors number them.

    PEFT has no format for it (`native_format.py`).
    """

    name = "mora"
    titles = ("MoRA", "MoRA with magnitudes")
    scaling = 1.0
    r: int = 8
    type: int = 6

    def __post_init__(self) -> None:
        if type(self.type) is not int or self.type not in PATTERNS:
            raise UserError(
                f"adapter.settings: type = {self.type!r} is none of MoRA's; it has 1 (sharing) and 6 (rotation)"
            )

    @property
    def lora_alpha(self) -> float:
        return float(self.r)

    @property
    def in_peft(self) -> bool:
        return False

    def largest_useful_r(self, shape: Shape) -> int:
        """From there on M covers the whole weight, and what goes beyond it is never used."""
        return -(-(max(shape) ** 2) // sum(shape))

    def parameters(self, shape: Shape) -> dict[str, Initial]:
        size = self._pattern(shape).size
        return {MATRIX: Initial((size, size))}

    def down(self, layer: Layer, x_ti: Tensor) -> Tensor:
        return self._pattern(layer.shape).down(x_ti)

    def add_up(self, layer: Layer, hidden: Tensor | None, y_to: Tensor) -> None:
        assert hidden is not None
        self._pattern(layer.shape).add_up(hidden, _matrix(layer), y_to)

    def gradients(
        self, layer: Layer, x_ti: Tensor, hidden: Tensor | None, *, grad_to: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        assert hidden is not None
        found, grad_hidden = self._pattern(layer.shape).gradients(hidden, _matrix(layer), grad_to)
        return {MATRIX: found}, grad_hidden

    def input_gradient(self, layer: Layer, grad_hidden: Tensor, onto: Tensor | None) -> Tensor:
        if onto is None:
            onto = grad_hidden.new_zeros(len(grad_hidden), layer.shape[1])
        self._pattern(layer.shape).add_input_gradient(grad_hidden, _matrix(layer), onto)
        return onto

    def add_norm_gradient(self, layer: Layer, row_scale: Tensor, gradients: dict[str, Tensor]) -> None:
        """W0 is read once, a chunk of rows at a time; its products with M's place in ΔW are additions."""
        pattern, m = self._pattern(layer.shape), _matrix(layer).float()
        rows, columns = layer.shape
        found, step = torch.zeros_like(m), max(1, CHUNK_ELEMENTS // columns)
        for start in range(0, rows, step):
            w = layer.weight_rows(start, min(start + step, rows))
            for first, last, group, own in pattern.stripes(start, len(w)):
                v = pattern.compress(w[first:last], group, 0).add_(pattern.gram(m[own], group))
                found[own].addcmul_(v, row_scale[start + first : start + last, None])
        gradients[MATRIX].add_(found)

    def row_products(self, shape: Shape, parameters: Tensors) -> RowProducts:
        """⟨compressed W0, M⟩ and ⟨compressed ΔW, M⟩ of each row, the second charged to a row's first element."""
        pattern, m = self._pattern(shape), parameters[MATRIX].float()

        def products(w: Tensor, row: int, col: int) -> tuple[Tensor, Tensor]:
            cross, squares = w.new_zeros(len(w)), w.new_zeros(len(w))
            for first, last, group, own in pattern.stripes(row, len(w)):
                cross[first:last] = (pattern.compress(w[first:last], group, col) * m[own]).sum(1)
                if col == 0:
                    squares[first:last] = (pattern.gram(m[own], group) * m[own]).sum(1)
            return cross, squares

        return products

    def merger(self, shape: Shape, values: Tensors) -> MergeRows:
        pattern, m = self._pattern(shape), values[MATRIX]

        def merge(weight: Tensor, start: int) -> None:
            for first, last, group, own in pattern.stripes(start, len(weight)):
                pattern.add_expanded(m[own], group, weight[first:last])

        return merge

    def to_peft(self, shape: Shape, values: Tensors, base_norm: Tensor | None) -> None:
        raise TypeError("PEFT has no format for MoRA")

    def _pattern(self, shape: Shape) -> Pattern:
        kind = PATTERNS[self.type]
        return kind(shape, kind.size_of(shape, self.r))


def _matrix(layer: Layer) -> Tensor:
    return layer.adapter_parameters()[MATRIX]


def _fold(values: Tensor, size: int) -> Tensor:
    """Σ of the groups of columns (rows, size); the last group may be short."""
    groups, rest = divmod(values.shape[1], size)
    folded = values[:, : groups * size].unflatten(1, (groups, size)).sum(1)
    folded[:, :rest] += values[:, groups * size :]
    return folded


def _add_repeated(values: Tensor, row: Tensor) -> None:
    """Add `row` (rows, size) to each group of columns in place; the last group may be short."""
    groups, rest = divmod(values.shape[1], row.shape[1])
    values[:, : values.shape[1] - rest].unflatten(1, (groups, row.shape[1])).add_(row[:, None])
    values[:, values.shape[1] - rest :].add_(row[:, :rest])


def _folded(values: Tensor, first: slice, repeats: Sequence[slice]) -> Tensor:
    """Columns `first` of values (rows, columns) plus the `repeats`, of which the last may be short."""
    if not repeats:
        return values[:, first]
    total = values[:, first].clone()
    for columns in repeats:
        total[:, : _length(columns)] += values[:, columns]
    return total


def _length(columns: slice) -> int:
    return columns.stop - columns.start


@lru_cache(maxsize=64)  # also because copies from host to device in every product would make each one wait
def _angles(size: int, groups: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of b·10000^(−2q/size), each (groups, size / 2), for groups b and pairs q; made in fp64."""
    speeds = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(groups, dtype=torch.float64), speeds)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
