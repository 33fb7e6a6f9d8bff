"""How far the rows of a weight V are from those of W0: what an analysis of a run records, whatever V is made of."""

from typing import NamedTuple

from torch import Tensor


class RowChange(NamedTuple):
    """Sums over each row of W0 and of ΔW = V − W0, (out,) fp32, the same on every process."""

    base_squares: Tensor
    """rowsum(W0²)."""
    cross: Tensor
    """rowsum(W0⊙ΔW)."""
    squares: Tensor
    """rowsum(ΔW²)."""
    magnitude_offset: Tensor | None = None
    """δ of trained magnitudes m = ‖W0‖ + δ; None where a row's magnitude is its norm, ‖V‖."""
