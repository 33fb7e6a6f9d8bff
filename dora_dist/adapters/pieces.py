"""Pieces of a flattened weight, and the rectangles of the matrix that a piece covers.

A whole weight is the piece [0, out·in); a ZeRO-3 shard is another, cut wherever it happens to be.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_dist.adapters.layer import AdaptedLinear

CHUNK_ELEMENTS = 4 * 2**20
"""Elements of W0 upcast to fp32 at a time: 16 MiB."""


class Rectangle(NamedTuple):
    """Rows [row, row+rows) × columns [col, col+cols) of a matrix, found at `offset` of a flat piece of it."""

    row: int
    rows: int
    col: int
    cols: int
    offset: int


def rectangles(start: int, stop: int, columns: int, max_elements: int = CHUNK_ELEMENTS) -> Iterator[Rectangle]:
    """Cut elements [start, stop) of a row-major matrix into rectangles: a cut first row, whole rows, a cut last row.

    Whole rows come in blocks of at most `max_elements` elements (at least one row).
    """
    position = start
    block = max(1, max_elements // columns)
    while position < stop:
        row, col = divmod(position, columns)
        if col == 0 and stop - position >= columns:
            rows, cols = min(block, (stop - position) // columns), columns
        else:
            rows, cols = 1, min(columns - col, stop - position)
        yield Rectangle(row, rows, col, cols, position - start)
        position += rows * cols


class WeightPiece(NamedTuple):
    """Whole records of a layer's weight, from its element `start` on: flat tensors, one for each of its storage's."""

    tensors: Sequence[Tensor]
    start: int


def whole_piece(layer: AdaptedLinear) -> WeightPiece:
    """The piece that is the whole weight. Raises RuntimeError for a layer that is sharded."""
    piece = WeightPiece([held.data.reshape(-1) for held in layer.held()], 0)
    if _stop(layer, piece) < layer.out_features * layer.in_features:
        raise RuntimeError("this layer's weight is a shard: its norms need zero3.norms.ShardedNormRefresher")
    return piece


def _stop(layer: AdaptedLinear, piece: WeightPiece) -> int:
    """The element of the weight at which a piece ends, or beyond: its last record may go further than the weight."""
    stored = next(iter(layer.storage.tensors.values()))
    return piece.start + piece.tensors[0].numel() // stored.elements * layer.storage.record


def blocks(layer: AdaptedLinear, piece: WeightPiece, device: torch.device) -> Iterator[tuple[Rectangle, Tensor]]:
    """The rectangles of `layer`'s weight that `piece` covers, each with its values (rows, cols), fp32 on `device`."""
    # A shard's padding goes beyond the weight's end, too.
    stop = min(_stop(layer, piece), layer.out_features * layer.in_features)
    for block in rectangles(piece.start, stop, layer.in_features):
        span = (block.offset, block.offset + block.rows * block.cols)
        yield block, layer.storage.to_fp32(piece.tensors, *span, device=device).view(block.rows, block.cols)
