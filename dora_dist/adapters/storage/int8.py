"""Eight bits a number: blocks of consecutive numbers, each with the scale of its largest one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dora_dist.adapters.storage.base import StoredTensor
from dora_dist.adapters.storage.packed import SCALE_BYTES, PackedStorage, check_settings


class Int8(PackedStorage):
    """A record is a block: a signed code of one byte for each number, then the scale, in two bytes (bfloat16).

    A number is code · scale, with scale = the block's largest absolute value / 127. The product of an 8-bit code and a
    bfloat16 is exact in fp32, so every device decodes the same numbers.
    """

    name = "int8"

    def __init__(self, block_size: int = 64) -> None:
        """block_size: numbers in a block."""
        self.block_size = self.record = block_size
        self.tensors: Mapping[str, StoredTensor] = {"weight": StoredTensor(block_size + SCALE_BYTES, torch.int8)}

    def settings(self) -> dict[str, Any]:
        return {"block_size": self.block_size}

    def with_settings(self, settings: Mapping[str, Any]) -> "Int8":
        return Int8(**check_settings(self, settings))

    def encode(self, values: Tensor) -> Sequence[Tensor]:
        """values (n, block_size) fp32 -> one tensor of bytes (n, block_size + 2)."""
        scale = (values.abs().amax(dim=1, keepdim=True) / 127).to(torch.bfloat16)
        divisor = torch.where(scale > 0, scale.float(), 1.0)  # a block of zeros has scale 0, and codes 0
        codes = (values / divisor).round_().clamp_(-127, 127).to(torch.int8)
        return [torch.cat([codes, scale.view(torch.int8)], dim=1)]

    def decode_into(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        [records] = tensors
        if out.dtype is torch.float16:  # small scales are not numbers of that range
            out.copy_(self.decode(tensors))
            return
        # Copied and then multiplied in place: a product of the two types would make a temporary of each first.
        out.copy_(records[:, : self.block_size]).mul_(records.view(torch.bfloat16)[:, -1:].to(out.dtype))
