"""How a layer holds its frozen weight: the one seam between stored tensors and everyone who uses the weight.

A weight W0 is (out, in), and its elements are counted row by row. A storage keeps it in RECORDS: `record` consecutive
elements of the weight, for which each of its tensors has a fixed number of consecutive elements of its own (a block's
codes and its scale, for example). Under ZeRO-3 every rank holds whole records, so it can decode its share without its
neighbours: loading and row norms need nothing more.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dora_dist.weights.placement import Fill, RecordFill


class StoredTensor(NamedTuple):
    """One tensor of a storage: how many of its elements belong to a record, and their dtype (None: the model's)."""

    elements: int
    dtype: torch.dtype | None = None


class WeightStorage(Protocol):
    """One way to hold a frozen (out, in) weight. `name` is what `model.storage` calls it.

    `tensors` are its tensors by name, which are direct members of the AdaptedLinear, as `weight` usually is. Where a
    method takes `tensors`, it is given them in this order.
    """

    name: str
    record: int
    tensors: Mapping[str, StoredTensor]

    def settings(self) -> dict[str, Any]:
        """What `model.storage_settings` can set, with the values that it has: plain JSON."""
        ...

    def with_settings(self, settings: Mapping[str, Any]) -> "WeightStorage":
        """The same with other `settings`, or some of them. Raises UserError for one that it cannot have."""
        ...

    def hold(self, weight: nn.Parameter) -> dict[str, nn.Parameter]:
        """The frozen parameters, by name, that hold `weight` (out, in); on the meta device if it is."""
        ...

    def encode_from(self, read: Fill, numel: int) -> RecordFill:
        """What writes stored records of a weight of `numel` elements, which `read` gives as numbers.

        The tensors that it writes to are flat and on the CPU.
        """
        ...

    def round_trip(self, values: Tensor) -> Tensor:
        """`values` (n,) fp32 of whole records (only a weight's last may be cut) as the layer computes with them."""
        ...

    def to_fp32(self, tensors: Sequence[Tensor], start: int, stop: int, *, device: torch.device) -> Tensor:
        """Elements [start, stop) of the weight, (stop − start,) fp32, counted from the first record in `tensors`.

        `tensors` are flat and hold whole records; their device may be another one than `device`.
        """
        ...

    def project(
        self, x: Tensor, tensors: Sequence[Tensor], shape: tuple[int, int], *, bias: Tensor | None = None
    ) -> Tensor:
        """x (tokens, in) -> x·W0ᵀ + bias (tokens, out), in x's dtype. `shape` is (out, in)."""
        ...

    def project_back(self, grad: Tensor, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """grad (tokens, out) -> grad·W0 (tokens, in), in grad's dtype."""
        ...
