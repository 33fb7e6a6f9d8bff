"""Row norms from ZeRO-3 shards: partial sums where the elements are, one bucketed all-reduce for the whole model.

No base weight is gathered. What travels per refresh is one fp32 number per output row (all-reduce), and the
parameters that norms depend on, unless they are resident anyway (gathered in buckets; LoRA's are r·(in + out) numbers a
layer).
"""

from collections.abc import Iterator

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.norms import NormRefresher, add_adapter_squares, add_base_squares
from dora_dist.zero3.gather import gathered
from dora_dist.zero3.partition import full_numel, local_piece

GATHER_BUCKET_ELEMENTS = 32 * 2**20
"""Adapter parameters gathered at a time, in elements of the whole: bounds the refresh's memory."""


class ShardedNormRefresher(NormRefresher):
    """A NormRefresher over shards: `refresh` is collective, on every rank and in the same order.

    `bytes_received` is this rank's running total: parameters gathered, and the all-reduce's result.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.device = torch.device(get_accelerator().current_device_name())

    def base_squares(self) -> dict[str, Tensor]:
        flat, sums = self._row_sums()
        for name, layer in self.layers.items():
            add_base_squares(layer, local_piece(layer), sums[name])
        self._all_reduce(flat)
        return sums

    def adapter_squares(self) -> Iterator[tuple[str, Tensor]]:
        flat, sums = self._row_sums()
        for bucket in self._buckets():
            needed = [p for name in bucket for p in _norm_parameters(self.layers[name])]
            with gathered(needed) as received:
                self.bytes_received += received
                for name in bucket:
                    layer = self.layers[name]
                    add_adapter_squares(layer, local_piece(layer), sums[name])
        self._all_reduce(flat)
        yield from sums.items()

    def _row_sums(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One flat fp32 buffer for all layers' rows, and each layer's (out,) view of it."""
        rows = [layer.out_features for layer in self.layers.values()]
        flat = torch.zeros(sum(rows), dtype=torch.float32, device=self.device)
        return flat, dict(zip(self.layers, flat.split(rows), strict=True))

    def _all_reduce(self, flat: Tensor) -> None:
        dist.all_reduce(flat)
        self.bytes_received += flat.numel() * flat.element_size()

    def _buckets(self) -> Iterator[list[str]]:
        """Names of layers whose norms depend on parameters, in groups whose parameters fit the gather bucket."""
        bucket: list[str] = []
        elements = 0
        for name, layer in self.layers.items():
            own = sum(full_numel(p) for p in _norm_parameters(layer))
            if bucket and elements + own > GATHER_BUCKET_ELEMENTS:
                yield bucket
                bucket, elements = [], 0
            if own:
                bucket.append(name)
                elements += own
        if bucket:
            yield bucket


def _norm_parameters(layer: AdaptedLinear) -> list[nn.Parameter]:
    own = layer.adapter_parameters()
    return [own[name] for name in layer.method.norm_parameters(layer.shape)]
