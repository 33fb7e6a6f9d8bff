"""The weight as it is: one floating-point number per element, in the model's dtype."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.adapters.storage.base import StoredTensor, WeightStorage
from dora_dist.adapters.storage.packed import check_settings
from dora_dist.weights.placement import Fill, RecordFill, in_place


class PlainStorage:
    """A record is one number, and the stored tensor is the (out, in) weight."""

    name = "plain"
    record = 1
    tensors: Mapping[str, StoredTensor] = {"weight": StoredTensor(1)}

    def settings(self) -> dict[str, Any]:
        return {}

    def with_settings(self, settings: Mapping[str, Any]) -> WeightStorage:
        check_settings(self, settings)
        return self

    def hold(self, weight: nn.Parameter) -> dict[str, nn.Parameter]:
        weight.requires_grad_(False)
        return {"weight": weight}

    def encode_from(self, read: Fill, numel: int) -> RecordFill:
        return in_place(read)

    def round_trip(self, values: Tensor) -> Tensor:
        return values

    def to_fp32(self, tensors: Sequence[Tensor], start: int, stop: int, *, device: torch.device) -> Tensor:
        return tensors[0][start:stop].to(device=device, dtype=torch.float32)

    def project(
        self, x: Tensor, tensors: Sequence[Tensor], shape: tuple[int, int], *, bias: Tensor | None = None
    ) -> Tensor:
        # aten's linear, not torch.nn.functional's: DeepSpeed replaces the latter by an autograd function
        # of its own, and the result must be the base model's to the last bit.
        return torch.ops.aten.linear(x, tensors[0], bias)

    def project_back(self, grad: Tensor, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        return grad @ tensors[0]


PLAIN = PlainStorage()
