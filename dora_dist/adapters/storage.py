"""How a frozen base weight is stored: the one seam between its bytes and everyone who multiplies by it.

The layer, the norms and the merge use a weight only through these three operations, so a packed storage
(int8, NF4) needs another class here and nothing else.
"""

from typing import Protocol

import torch
from torch import Tensor


class WeightStorage(Protocol):
    """Operations on a frozen (out, in) weight, or on a flat piece of it."""

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, in) -> x·Wᵀ + bias (tokens, out), in x's dtype."""
        ...

    def project_back(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad (tokens, out) -> grad·W (tokens, in), in grad's dtype."""
        ...

    def to_fp32(self, piece: Tensor, device: torch.device) -> Tensor:
        """A 1-D piece of the flattened weight as fp32 values on `device`."""
        ...


class PlainStorage:
    """The weight as it is: one floating-point number per element."""

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # aten's linear, not torch.nn.functional's: DeepSpeed replaces the latter by an autograd function
        # of its own, and the result must be the base model's to the last bit.
        return torch.ops.aten.linear(x, weight, bias)

    def project_back(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def to_fp32(self, piece: Tensor, device: torch.device) -> Tensor:
        return piece.to(device=device, dtype=torch.float32)


PLAIN = PlainStorage()
