"""Placing a model's parameters as ZeRO-3 shards: the `weights.placement.Placement` of a run with ranks."""

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import free_param
from torch import Tensor, nn

from dora_dist.weights.placement import RecordFill
from dora_dist.zero3.flat import replace_reductions
from dora_dist.zero3.gather import forget_copies, replace_gathers
from dora_dist.zero3.optimizer_state import master_or_shard
from dora_dist.zero3.partition import local_range, shard_length


class ShardedPlacement:
    """Parameters born as ZeRO-3 shards: each rank fills its own elements; nothing is broadcast or held whole.

    `deepspeed_config` is the engine's final JSON (no "auto"). Needs an initialised process group.
    """

    def __init__(self, deepspeed_config: dict[str, Any]) -> None:
        self._init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config)
        if self._init.remote_device == OffloadDeviceEnum.nvme:
            raise ValueError("offload_param to NVMe is not supported: base shards are read in place")
        replace_reductions()

    @property
    def first(self) -> bool:
        return self._init.rank == 0

    def place(self, parameters: Sequence[nn.Parameter], records: int, fill: RecordFill) -> list[nn.Parameter]:
        sharded = [self._hollow(parameter, records) for parameter in parameters]
        world, rank = sharded[0].ds_zero_partition_world_size, sharded[0].ds_zero_partition_rank
        share = max(-(-records // world), 1)
        first, last = min(rank * share, records), min((rank + 1) * share, records)
        lengths = [share * (parameter.numel() // max(records, 1)) for parameter in parameters]
        values = [torch.zeros(n, dtype=p.dtype) for n, p in zip(lengths, parameters, strict=True)]
        fill(first, last, [v[: (last - first) * (len(v) // share)] for v in values])
        for parameter, shard in zip(sharded, values, strict=True):
            self._give(parameter, shard)
        return sharded

    def _hollow(self, parameter: nn.Parameter, records: int) -> nn.Parameter:
        """A parameter that the engine knows, with no shard yet."""
        init, shape = self._init, parameter.shape
        elements = parameter.numel() // max(records, 1)
        if elements > 1:  # the engine cuts at ceil(numel / world size), which must be at the end of a record
            shape = torch.Size([elements * -(-records // init.dp_world_size) * init.dp_world_size])
        # One element of memory, expanded to the full shape, is all that the conversion looks at.
        hollow = torch.empty(1, dtype=parameter.dtype, device=init.local_device).expand(shape)
        sharded = nn.Parameter(hollow, parameter.requires_grad)
        init._convert_to_deepspeed_param(sharded)
        return sharded

    def _give(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Make `values`, padding included, the parameter's shard."""
        shard = values.to(self._init.remote_device)
        if self._init.pin_memory:
            shard = get_accelerator().pin_memory(shard)
        shard.ds_numel = len(values)  # said once: from here on it is the shard's own `ds_numel`
        shard.status = PartitionedParamStatus.AVAILABLE
        shard.final_location = None
        parameter.ds_tensor = shard
        parameter.kept_whole = None  # a frozen one's data, where `gather.py` keeps it
        parameter.ds_numel_aligned = len(values) * parameter.ds_zero_partition_world_size
        free_param(parameter)
        if parameter.ds_zero_partition_world_size > 1:
            replace_gathers(parameter, self._init)

    def place_buffer(self, buffer: Tensor) -> Tensor:
        return buffer.to(self._init.local_device)  # the engine moves parameters only

    def assign(self, parameter: nn.Parameter, values: Tensor) -> None:
        start, stop = local_range(parameter)
        parameter.ds_tensor.data[: stop - start].copy_(values.flatten()[start:stop])
        forget_copies(parameter)

    def read(self, parameter: nn.Parameter) -> Tensor | None:
        device, group = self._init.local_device, parameter.ds_process_group
        mine = torch.zeros(shard_length(parameter), dtype=torch.float32, device=device)
        held = master_or_shard(parameter)
        mine[: len(held)].copy_(held)
        whole = torch.empty(len(mine) * dist.get_world_size(group), dtype=torch.float32, device=device)
        dist.all_gather_into_tensor(whole, mine, group=group)
        return whole[: parameter.ds_numel].view(parameter.ds_shape).cpu() if self.first else None

    def anywhere(self, found: list[str]) -> list[str]:
        everyone: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        return list(dict.fromkeys(name for names in everyone for name in names))
