"""A storage for tests with two tensors: four-bit codes, and fp32 scales of their own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dora_dist.adapters.storage import PackedStorage, StoredTensor, register

BLOCK = 10


class TwoTensors(PackedStorage):
    """Blocks of 10 numbers: 5 bytes of codes in `weight`, one number in `weight_scale`."""

    name = "two_tensors"
    record = BLOCK
    tensors: Mapping[str, StoredTensor] = {
        "weight": StoredTensor(BLOCK // 2, torch.uint8),
        "weight_scale": StoredTensor(1, torch.float32),
    }

    def encode(self, values: Tensor) -> Sequence[Tensor]:
        scale = values.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
        codes = ((values / scale).round() + 8).to(torch.uint8)
        return [codes[:, ::2] * 16 + codes[:, 1::2], scale]

    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        codes, scale = tensors
        halves = torch.stack([codes // 16, codes % 16], dim=2).view(len(codes), BLOCK)
        return (halves.float() - 8) * scale


register(TwoTensors())
