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
temporaries are (t, r̂), and for type 6 (t, in), (t, out) and the rotated tiles, (in, r̂): all of them are multiplied at
once, so that a layer starts as few kernels as LoRA's, and its last group costs as much as a whole one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.adapters.method import Initial, Layer, MergeRows, RowProducts, Shape, Tensors, register
from dora_dist.adapters.pieces import CHUNK_ELEMENTS
from dora_dist.adapters.update import Update
from dora_dist.runtime.errors import UserError

MATRIX = "mora_M"


class Stripe(NamedTuple):
    """Rows [first, last) of a block that lie in one group of outputs, and the rows of M (a slice) that they have."""

    first: int
    last: int
    group: int
    own: slice


@dataclass(frozen=True)
class Tiling(ABC):
    """How M fills a ΔW of `shape` (out, in); `size` is r̂. Arguments `m` are M (r̂, r̂)."""

    shape: Shape
    size: int
    multiple: ClassVar[int] = 1
    """Of which r̂ is one."""

    @classmethod
    def size_of(cls, shape: Shape, r: int) -> int:
        """r̂ for LoRA's rank r."""
        return max(cls.multiple, math.isqrt(sum(shape) * r) // cls.multiple * cls.multiple)

    @classmethod
    def largest_useful_r(cls, shape: Shape) -> int:
        """The least r whose M covers the whole weight: what goes beyond it is never used."""
        size = -(-max(shape) // cls.multiple) * cls.multiple
        return -(-(size**2) // sum(shape))

    @abstractmethod
    def down(self, x_ti: Tensor) -> Tensor | None:
        """What `add_up` and `gradients` need of the inputs; None: all of them."""

    @abstractmethod
    def add_up(self, hidden: Tensor, m: Tensor, y_to: Tensor) -> None:
        """y += ΔW·x in place."""

    @abstractmethod
    def gradients(self, hidden: Tensor, m: Tensor, grad_to: Tensor) -> tuple[Tensor, Tensor]:
        """M's gradient, fp32, and what `add_input_gradient` needs (t, ...)."""

    @abstractmethod
    def add_input_gradient(self, grad_hidden: Tensor, m: Tensor, onto: Tensor) -> None:
        """onto (t, in) += the inputs' gradient, in place."""

    @abstractmethod
    def row_products(self, m: Tensor) -> RowProducts:
        """As a method's, of M in fp32."""

    @abstractmethod
    def norm_gradient(self, m: Tensor, row_scale: Tensor, base: Iterator[tuple[int, Tensor]]) -> Tensor:
        """M's gradient, given one of row_scale_o·V'_o for each row of V' = W0 + ΔW; all fp32.

        `base` has W0's rows, a block at a time, with the number of its first one.
        """

    @abstractmethod
    def merger(self, m: Tensor) -> MergeRows:
        """What adds rows of ΔW to those of W0; M is fp32."""

    def stripes(self, row: int, rows: int) -> Iterator[Stripe]:
        """Cut rows [row, row + rows) where groups of outputs begin."""
        position, stop = row, row + rows
        while position < stop:
            group, offset = divmod(position, self.size)
            end = min(stop, (group + 1) * self.size)
            yield Stripe(position - row, end - row, group, slice(offset, offset + end - position))
            position = end


class Sharing(Tiling):
    """Type 1: every tile is M."""

    def down(self, x_ti: Tensor) -> Tensor:
        return _fold(x_ti, self.size)

    def add_up(self, hidden: Tensor, m: Tensor, y_to: Tensor) -> None:
        _add_repeated(y_to, hidden @ m.t())

    def gradients(self, hidden: Tensor, m: Tensor, grad_to: Tensor) -> tuple[Tensor, Tensor]:
        folded = _fold(grad_to, self.size)
        return (folded.t() @ hidden).float(), folded @ m

    def add_input_gradient(self, grad_hidden: Tensor, m: Tensor, onto: Tensor) -> None:
        _add_repeated(onto, grad_hidden)

    def row_products(self, m: Tensor) -> RowProducts:
        """⟨C, M's row⟩ with C a row of W0, and of ΔW, compressed as an input is."""
        squares = (self._compressed_update(m) * m).sum(1)

        def products(w: Tensor, row: int, col: int) -> tuple[Tensor, Tensor]:
            own = _rows_of(self.size, row, w)
            cross = (self._compress(w, col) * m[own]).sum(1)
            return cross, squares[own] if col == 0 else torch.zeros_like(cross)

        return products

    def norm_gradient(self, m: Tensor, row_scale: Tensor, base: Iterator[tuple[int, Tensor]]) -> Tensor:
        found = self._compressed_update(m).mul_(_fold(row_scale[None], self.size).t())
        for start, w in base:
            compressed, scale = self._compress(w, 0), row_scale[start : start + len(w), None]
            for first, last, _, own in self.stripes(start, len(w)):
                found[own].addcmul_(compressed[first:last], scale[first:last])
        return found

    def merger(self, m: Tensor) -> MergeRows:
        def merge(weight: Tensor, start: int) -> None:
            for first, last, _, own in self.stripes(start, len(weight)):
                _add_repeated(weight[first:last], m[own])

        return merge

    def _compress(self, rows: Tensor, col: int) -> Tensor:
        """Columns from `col` on of rows of a weight -> (rows, r̂)."""
        offset = col % self.size
        head = rows[:, : self.size - offset]
        folded = _fold(rows[:, head.shape[1] :], self.size)
        folded[:, offset : offset + head.shape[1]] += head
        return folded

    def _compressed_update(self, m: Tensor) -> Tensor:
        """Of ΔW's rows (r̂, r̂); they repeat as M's do."""
        groups, rest = divmod(self.shape[1], self.size)
        own = m * groups
        own[:, :rest] += m[:, :rest]
        return own


class Rotation(Tiling):
    """Type 6: one tile for each group of outputs, M·R_b over the inputs of group b; M·R_b is M's rows turned by −b.

    All tiles are multiplied at once, so that a GPU has few kernels to start: the last group is filled up with zeros.
    """

    multiple = 2

    def down(self, x_ti: Tensor) -> None:
        return None

    def add_up(self, hidden: Tensor, m: Tensor, y_to: Tensor) -> None:
        product = torch.bmm(self._seen(hidden), self._tiles(m).to(m.dtype).mT)
        _add_repeated(y_to, product.transpose(0, 1).flatten(1))

    def gradients(self, hidden: Tensor, m: Tensor, grad_to: Tensor) -> tuple[Tensor, Tensor]:
        folded = _fold(grad_to, self._used * self._tile[0])
        return self._of_tiles(torch.bmm(self._by_tile(folded).mT, self._seen(hidden)).float()), folded

    def add_input_gradient(self, grad_hidden: Tensor, m: Tensor, onto: Tensor) -> None:
        found = torch.bmm(self._by_tile(grad_hidden), self._tiles(m).to(m.dtype)).transpose(0, 1).flatten(1)
        seen = min(found.shape[1], onto.shape[1])
        onto[:, :seen] += found[:, :seen]

    def row_products(self, m: Tensor) -> RowProducts:
        """⟨W0's inputs that a row sees, its tile's row⟩."""
        tiles = self._tiles(m)
        squares = tiles.square().sum(2).flatten()

        def products(w: Tensor, row: int, col: int) -> tuple[Tensor, Tensor]:
            cross = w.new_zeros(len(w))
            for first, last, group, own in self.stripes(row, len(w)):
                inputs = self._inputs(group)
                start, stop = max(inputs.start, col), min(inputs.stop, col + w.shape[1])
                if start < stop:
                    tile = tiles[group % self._groups, own, start - inputs.start : stop - inputs.start]
                    cross[first:last] = (w[first:last, start - col : stop - col] * tile).sum(1)
            return cross, squares[_rows_of(len(squares), row, w)] if col == 0 else torch.zeros_like(cross)

        return products

    def norm_gradient(self, m: Tensor, row_scale: Tensor, base: Iterator[tuple[int, Tensor]]) -> Tensor:
        grads = self._tiles(m)
        grads.mul_(_fold(row_scale[None], self._used * self._tile[0]).view(self._used, -1, 1))
        for start, w in base:
            scale = row_scale[start : start + len(w), None]
            for first, last, group, own in self.stripes(start, len(w)):
                seen = w[first:last, self._inputs(group)]
                grads[group % self._groups, own, : seen.shape[1]].addcmul_(seen, scale[first:last])
        return self._of_tiles(grads)

    def merger(self, m: Tensor) -> MergeRows:
        tiles = self._tiles(m)

        def merge(weight: Tensor, start: int) -> None:
            for first, last, group, own in self.stripes(start, len(weight)):
                seen = weight[first:last, self._inputs(group)]
                seen += tiles[group % self._groups, own, : seen.shape[1]]

        return merge

    @property
    def _groups(self) -> int:
        """n, of inputs."""
        return -(-self.shape[1] // self.size)

    @property
    def _used(self) -> int:
        """Groups of inputs that an output sees: not all of them where there are fewer outputs than inputs."""
        return min(self._groups, -(-self.shape[0] // self.size))

    @property
    def _tile(self) -> Shape:
        """Rows and columns of a tile: r̂, unless the layer has fewer."""
        return min(self.size, self.shape[0]), min(self.size, self.shape[1])

    def _inputs(self, group: int) -> slice:
        """What a group of outputs sees."""
        first = group % self._groups * self.size
        return slice(first, min(first + self.size, self.shape[1]))

    def _seen(self, x_ti: Tensor) -> Tensor:
        """The inputs by group (used, t, columns), as far as an output sees them: a view where nothing is filled up."""
        columns = self._used * self._tile[1]
        if (lacking := columns - x_ti.shape[1]) > 0:
            x_ti = F.pad(x_ti, (0, lacking))
        return x_ti[:, :columns].unflatten(1, (self._used, -1)).transpose(0, 1)

    def _by_tile(self, folded: Tensor) -> Tensor:
        """(t, used·rows) -> (used, t, rows)."""
        return folded.unflatten(1, (self._used, -1)).transpose(0, 1)

    def _tiles(self, m: Tensor) -> Tensor:
        """M·R_b of each group of inputs that is used (used, rows, columns), in fp32 at least; 0 beyond the inputs."""
        exact = m if m.dtype == torch.float64 else m.float()
        rows, columns = self._tile
        tiles = self._turned(exact[None], back=True)[:, :rows, :columns]
        if (beyond := self._used * columns - self.shape[1]) > 0:
            tiles[-1, :, columns - beyond :] = 0
        return tiles

    def _of_tiles(self, grads: Tensor) -> Tensor:
        """M's gradient, given that of the tiles (used, rows, columns)."""
        rows, columns = self._tile
        if (rows, columns) != (self.size, self.size):
            grads = F.pad(grads, (0, self.size - columns, 0, self.size - rows))
        return self._turned(grads).sum(0)

    def _turned(self, m: Tensor, back: bool = False) -> Tensor:
        """R_b of the last dimension, or R_bᵀ (`back`), for every group b of the first that is used."""
        cos, sin = (table[: self._used, None] for table in _angles(self.size, self._groups, m.device, m.dtype))
        if back:
            sin = -sin
        one, two = m.chunk(2, dim=-1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


TILINGS: dict[int, type[Tiling]] = {1: Sharing, 6: Rotation}


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
    in_peft = False
    r: int = 8
    type: int = 6

    def __post_init__(self) -> None:
        if type(self.type) is not int or self.type not in TILINGS:
            raise UserError(
                f"adapter.settings: type = {self.type!r} is none of MoRA's; it has 1 (sharing) and 6 (rotation)"
            )

    @property
    def lora_alpha(self) -> float:
        return float(self.r)

    def largest_useful_r(self, shape: Shape) -> int:
        return TILINGS[self.type].largest_useful_r(shape)

    def parameters(self, shape: Shape) -> dict[str, Initial]:
        size = self._tiling(shape).size
        return {MATRIX: Initial((size, size))}

    def down(self, layer: Layer, x_ti: Tensor) -> Tensor | None:
        return self._tiling(layer.shape).down(x_ti)

    def add_up(self, layer: Layer, hidden: Tensor, y_to: Tensor) -> None:
        self._tiling(layer.shape).add_up(hidden, _matrix(layer), y_to)

    def gradients(
        self, layer: Layer, x_ti: Tensor, hidden: Tensor | None, *, grad_to: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        seen = x_ti if hidden is None else hidden
        found, grad_hidden = self._tiling(layer.shape).gradients(seen, _matrix(layer), grad_to)
        return {MATRIX: found}, grad_hidden

    def input_gradient(self, layer: Layer, grad_hidden: Tensor, onto: Tensor | None) -> Tensor:
        if onto is None:
            onto = grad_hidden.new_zeros(len(grad_hidden), layer.shape[1])
        self._tiling(layer.shape).add_input_gradient(grad_hidden, _matrix(layer), onto)
        return onto

    def add_norm_gradient(self, layer: Layer, row_scale: Tensor, gradients: dict[str, Tensor]) -> None:
        """W0 is read once, a chunk of rows at a time; its products with M's place in ΔW are additions."""
        rows, columns = layer.shape
        step = max(1, CHUNK_ELEMENTS // columns)
        base = ((start, layer.weight_rows(start, min(start + step, rows))) for start in range(0, rows, step))
        gradients[MATRIX].add_(self._tiling(layer.shape).norm_gradient(_matrix(layer).float(), row_scale, base))

    def row_products(self, shape: Shape, parameters: Tensors) -> RowProducts:
        """The second product is charged to a row's first element."""
        return self._tiling(shape).row_products(parameters[MATRIX].float())

    def merger(self, shape: Shape, values: Tensors) -> MergeRows:
        return self._tiling(shape).merger(values[MATRIX])

    def to_peft(self, shape: Shape, values: Tensors, base_norm: Tensor | None) -> None:
        raise TypeError("PEFT has no format for MoRA")

    def _tiling(self, shape: Shape) -> Tiling:
        kind = TILINGS[self.type]
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


def _rows_of(period: int, row: int, w: Tensor) -> Tensor:
    """Which of `period` rows, over and over again, the rows of a block `w` are that begins at `row`: (rows,) int64."""
    return torch.arange(row, row + len(w), device=w.device).remainder_(period)


@lru_cache(maxsize=64)  # also because copies from host to device in every product would make each one wait
def _angles(size: int, groups: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of b·10000^(−2q/size), each (groups, size / 2), for groups b and pairs q; made in fp64."""
    speeds = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(groups, dtype=torch.float64), speeds)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
