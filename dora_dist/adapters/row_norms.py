"""Norms of a weight's rows where the weight itself is at hand, to be merged or exported: exact, and in place."""

import torch
from torch import Tensor


def row_norms(weight: Tensor) -> Tensor:
    """(rows,) fp64 of a weight (rows, in): squares could overflow in fp32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)


def give_norms(weight: Tensor, magnitude: Tensor) -> None:
    """Scale the rows of `weight`, fp32 (rows, in), to the norms `magnitude` (rows,), in place.

    A row of norm 0 is kept (factor 1), as in the adapted layer; a negative magnitude turns a row around.
    """
    norm = row_norms(weight)
    weight.mul_(torch.where(norm == 0, 1.0, magnitude / norm)[:, None].float())
