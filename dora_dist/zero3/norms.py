"""Row norms from ZeRO-3 shards: partial sums where the elements are, one bucketed all-reduce for the whole model.

No base weight is gathered. What travels per refresh is one fp32 number per output row (all-reduce), and the
parameters that norms depend on, unless they are resident anyway (gathered in buckets; LoRA's are r·(in + out) numbers a
layer). A refresh that also records (`analysis.every`) sends two more numbers per row, in an all-reduce of their own:
in a buffer of another length a sum of three ranks may round differently, and recording must not change a norm.
"""

from collections.abc import Iterator, Mapping

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.norms import (
    NormRefresher,
    RowSums,
    add_base_squares,
    add_update_sums,
    magnitude_offset,
)
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

    def base_squares(self, layers: Mapping[str, AdaptedLinear]) -> dict[str, Tensor]:
        flat, sums = self._buffer(layers)
        for name, layer in layers.items():
            add_base_squares(layer, local_piece(layer), sums[name])
        self._all_reduce(flat)
        return sums

    def row_sums(self, recorded: Mapping[str, AdaptedLinear]) -> Iterator[tuple[str, RowSums]]:
        flat_changes, changes = self._buffer(self.layers)
        flat_products, products = self._buffer(recorded, sums=2)
        offsets: dict[str, Tensor | None] = {}
        every = {**self.layers, **recorded}
        for bucket in self._buckets(every, recorded):
            with gathered([p for name in bucket for p in _needed(every[name], name in recorded)]) as received:
                self.bytes_received += received
                for name in bucket:
                    layer, piece = every[name], local_piece(every[name])
                    add_update_sums(layer, piece, change=changes.get(name), products=products.get(name))
                    if name in recorded:
                        offsets[name] = magnitude_offset(layer)
        self._all_reduce(flat_changes)
        self._all_reduce(flat_products)
        for name in every:
            yield name, RowSums(changes.get(name), products.get(name), offsets.get(name))

    def _buffer(self, layers: Mapping[str, AdaptedLinear], sums: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
        """One flat fp32 buffer of so many sums over each of the layers' rows, and each layer's view, (sums, out) or, of
        one sum, (out,).
        """
        sizes = [sums * layer.out_features for layer in layers.values()]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=self.device)
        views = (part.view(sums, -1).squeeze(0) for part in flat.split(sizes))
        return flat, dict(zip(layers, views, strict=True))

    def _all_reduce(self, flat: Tensor) -> None:
        if not flat.numel():
            return
        dist.all_reduce(flat)
        self.bytes_received += flat.numel() * flat.element_size()

    def _buckets(
        self, layers: Mapping[str, AdaptedLinear], recorded: Mapping[str, AdaptedLinear]
    ) -> Iterator[list[str]]:
        """Names of layers that need parameters gathered, in groups whose parameters fit the gather bucket."""
        bucket: list[str] = []
        elements = 0
        for name, layer in layers.items():
            own = sum(full_numel(p) for p in _needed(layer, name in recorded))
            if bucket and elements + own > GATHER_BUCKET_ELEMENTS:
                yield bucket
                bucket, elements = [], 0
            if own:
                bucket.append(name)
                elements += own
        if bucket:
            yield bucket


def _needed(layer: AdaptedLinear, recorded: bool) -> list[nn.Parameter]:
    """What a layer's row norms depend on; of one that is recorded, its magnitude too."""
    method, own = layer.method, layer.adapter_parameters()
    names = [*method.norm_parameters(layer.shape)]
    if recorded and method.magnitude is not None:
        names.append(method.magnitude)
    return [own[name] for name in names]
