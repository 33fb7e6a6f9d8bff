"""Four bits a number: the 16 values of NormalFloat, times the largest absolute value of a block.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (arXiv 2305.14314), section 3 and
appendix E.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dora_dist.adapters.storage.base import StoredTensor
from dora_dist.adapters.storage.packed import SCALE_BYTES, PackedStorage, check_settings
from dora_dist.runtime.extras import import_bitsandbytes

VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What the codes 0 to 15 stand for: quantiles of a normal distribution, scaled to [-1, 1]."""

GROUP = 16
"""Blocks that share one bfloat16 number where their scales are eight bits."""

Kernel = Callable[[Tensor, Tensor, int, torch.dtype], Tensor]
"""(codes (n,) uint8, scales (blocks,) fp32, block size, dtype) -> (2·n,) numbers."""


class NF4(PackedStorage):
    """Two codes a byte, the first in its upper half. A record is a block with its scale, in two bytes (bfloat16); or,
    with `double_quant`, 16 blocks: their codes, their scales in a byte each, and the bfloat16 that is these' unit.

    A number is the code's value · scale, rounded once. Decoding is the work of bitsandbytes where that is installed and
    agrees with the plain form to the last bit, which is asked once for each kind of device and size of blocks; encoding
    is always ours.
    """

    name = "nf4"

    def __init__(self, block_size: int = 64, double_quant: bool = False) -> None:
        """block_size: numbers in a block. double_quant: 8-bit scales, 4.14 bits a number in place of 4.25."""
        self.block_size, self.double_quant = block_size, double_quant
        self.blocks = GROUP if double_quant else 1
        self.record = self.blocks * block_size
        self._code_bytes = self.record // 2
        scales = GROUP if double_quant else 0
        stored = StoredTensor(self._code_bytes + scales + SCALE_BYTES, torch.int8)
        self.tensors: Mapping[str, StoredTensor] = {"weight": stored}

    def settings(self) -> dict[str, Any]:
        return {"block_size": self.block_size, "double_quant": self.double_quant}

    def with_settings(self, settings: Mapping[str, Any]) -> "NF4":
        return NF4(**check_settings(self, settings))

    def encode(self, values: Tensor) -> Sequence[Tensor]:
        """values (n, record) fp32 -> one tensor of bytes (n, bytes of a record)."""
        largest = values.view(len(values), self.blocks, self.block_size).abs().amax(dim=2)
        stored, scale = self._encoded_scales(largest)
        divisor = torch.where(scale > 0, scale, 1.0).repeat_interleave(self.block_size, dim=1)
        codes = nearest(values / divisor)
        halves = codes.view(len(values), -1, 2)
        return [torch.cat([(halves[..., 0] * 16 + halves[..., 1]).view(torch.int8), stored], dim=1)]

    def _encoded_scales(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """(n, blocks) fp32 -> their bytes (n, ...), and what these stand for, (n, blocks) fp32."""
        if not self.double_quant:
            rounded = largest.to(torch.bfloat16)
            return rounded.view(torch.int8), rounded.float()
        unit = (largest.amax(dim=1, keepdim=True) / 255).to(torch.bfloat16)
        # Rounded up: a block's largest number must not be cut, and a small block beside a large one must not vanish.
        codes = (largest / torch.where(unit > 0, unit.float(), 1.0)).ceil_().clamp_(max=255)
        stored = torch.cat([codes.to(torch.uint8).view(torch.int8), unit.view(torch.int8)], dim=1)
        return stored, codes * unit.float()

    def decode_into(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        [records] = tensors
        codes = records[:, : self._code_bytes].contiguous().view(torch.uint8).view(-1)
        unit = records.view(torch.bfloat16)[:, -1:].float()
        if self.double_quant:
            unit = records[:, self._code_bytes : -SCALE_BYTES].view(torch.uint8) * unit
        kernel = _kernel(records.device.type, self.block_size)
        out.copy_(kernel(codes, unit.reshape(-1), self.block_size, out.dtype).view_as(out))


def nearest(values: Tensor) -> Tensor:
    """The codes of the values nearest to `values` in [-1, 1] (a little beyond is the last), uint8, of its shape."""
    starts, limits = _cells()
    cells = values.add(1.0).mul_(_CELLS / 2).to(torch.int32).clamp_(0, _CELLS - 1).view(-1)
    codes = starts[cells] + (values.view(-1) > limits[cells])
    return codes.view(values.shape)


_CELLS = 2048


@lru_cache(1)
def _cells() -> tuple[Tensor, Tensor]:
    """[-1, 1] in equal cells, in each of which at most one code ends: the code that a cell starts with, uint8, and
    where the next one begins, fp32 (infinity where none does). A search among 15 limits would take many times as long.
    """
    values = torch.tensor(VALUES)
    limits = (values[1:] + values[:-1]) / 2
    edges = torch.linspace(-1, 1, _CELLS + 1)
    first = torch.bucketize(edges[:-1], limits)
    inside = torch.bucketize(edges[1:], limits) > first
    ends = torch.cat([limits, torch.tensor([torch.inf])])
    return first.to(torch.uint8), torch.where(inside, ends[first], torch.inf)


def decoded(codes: Tensor, scales: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """The plain form of a `Kernel`: what the codes say, number by number."""
    pairs = _pairs(codes.device).index_select(0, codes.to(torch.int32))
    numbers = pairs.view(torch.float32).view(-1, block_size).mul_(scales.view(-1, 1))
    return numbers.view(-1).to(dtype)


@lru_cache
def _pairs(device: torch.device) -> Tensor:
    """The two fp32 numbers of each byte, (256,), as one 8-byte number: half as many are looked up."""
    values, bytes_ = torch.tensor(VALUES), torch.arange(256)
    return torch.stack([values[bytes_ // 16], values[bytes_ % 16]], dim=1).view(torch.int64).view(-1).to(device)


@lru_cache
def _kernel(device_type: str, block_size: int) -> Kernel:
    """bitsandbytes' on this kind of device if it is there and gives the numbers of `decoded`, else that."""
    try:
        import_bitsandbytes()
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 256, (32 * block_size,), dtype=torch.uint8, generator=generator).to(device_type)
        scales = torch.rand(64, generator=generator).to(torch.bfloat16).float().to(device_type)
        sample = (codes, scales, block_size)
        agrees = all(
            torch.equal(_of_bitsandbytes(*sample, dtype), decoded(*sample, dtype))
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        )
    except Exception:  # not installed, without a kernel for the device, or for another version of its driver
        agrees = False
    return _of_bitsandbytes if agrees else decoded


def _of_bitsandbytes(codes: Tensor, scales: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    numbers: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes.view(-1, 1), scales, block_size, "nf4", [2 * len(codes)], dtype
    )
    return numbers.view(-1)
