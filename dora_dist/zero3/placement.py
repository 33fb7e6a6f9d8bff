"""Placing a model's parameters as ZeRO-3 shards: the `weights.placement.Placement` of a run with ranks."""

from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import free_param
from torch import Tensor, nn

from dora_dist.weights.placement import Fill
from dora_dist.zero3.gather import forget_copies, replace_gathers
from dora_dist.zero3.partition import local_range


class ShardedPlacement:
    """Parameters born as ZeRO-3 shards: each rank fills its own elements; nothing is broadcast or held whole.

    `deepspeed_config` is the engine's final JSON (no "auto"). Needs an initialised process group.
    """

    def __init__(self, deepspeed_config: dict[str, Any]) -> None:
        self._init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config)
        if self._init.remote_device == OffloadDeviceEnum.nvme:
            raise ValueError("offload_param to NVMe is not supported: base shards are read in place")

    @property
    def first(self) -> bool:
        return self._init.rank == 0

    def place(self, parameter: nn.Parameter, dtype: torch.dtype, fill: Fill) -> nn.Parameter:
        init = self._init
        # One element of memory, expanded to the full shape, is all that the conversion looks at.
        hollow = torch.empty(1, dtype=dtype, device=init.local_device).expand(parameter.shape)
        sharded = nn.Parameter(hollow, parameter.requires_grad)
        init._convert_to_deepspeed_param(sharded)
        world, rank = sharded.ds_zero_partition_world_size, sharded.ds_zero_partition_rank
        length = -(-sharded.ds_numel // world)  # said once: from here on it is the shard's own `ds_numel`
        start = min(rank * length, sharded.ds_numel)
        stop = min(start + length, sharded.ds_numel)

        values = torch.zeros(length, dtype=dtype)
        fill(start, stop, values[: stop - start])
        shard = values.to(init.remote_device)
        if init.pin_memory:
            shard = get_accelerator().pin_memory(shard)
        shard.ds_numel = length
        shard.status = PartitionedParamStatus.AVAILABLE
        shard.final_location = None
        sharded.ds_tensor = shard
        sharded.ds_numel_aligned = length * world
        free_param(sharded)
        if world > 1:
            replace_gathers(sharded)
        return sharded

    def place_buffer(self, buffer: Tensor) -> Tensor:
        return buffer.to(self._init.local_device)  # the engine moves parameters only

    def assign(self, parameter: nn.Parameter, values: Tensor) -> None:
        start, stop = local_range(parameter)
        parameter.ds_tensor.data[: stop - start].copy_(values.flatten()[start:stop])
        forget_copies(parameter)

    def anywhere(self, found: list[str]) -> list[str]:
        everyone: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        return list(dict.fromkeys(name for names in everyone for name in names))
