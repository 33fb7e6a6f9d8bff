"""The only file that touches ZeRO-3's internals.

Rank k of W holds elements [k·P, min((k+1)·P, numel)) of a parameter's row-major flat tensor, P = ceil(numel / W).
The shard tensor has length P on every rank; what lies beyond the valid elements is padding, and some ranks hold
nothing but padding. A trainable parameter exists up to three times: the optimizer's fp32 master shard, the
low-precision shard, and, for small ("persistent") parameters, a resident whole copy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import MultipleAllGatherHandles, ZeroParamStatus, free_param
from deepspeed.runtime.zero.utils import is_zero_param
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from dora_dist.adapters.pieces import WeightPiece
from dora_dist.weights.placement import Fill


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
            _replace_gathers(sharded)
        return sharded

    def place_buffer(self, buffer: Tensor) -> Tensor:
        return buffer.to(self._init.local_device)  # the engine moves parameters only

    def assign(self, parameter: nn.Parameter, values: Tensor) -> None:
        start, stop = local_range(parameter)
        parameter.ds_tensor.data[: stop - start].copy_(values.flatten()[start:stop])
        _forget_copies(parameter)

    def anywhere(self, found: list[str]) -> list[str]:
        everyone: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        return list(dict.fromkeys(name for names in everyone for name in names))


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 owns this parameter."""
    return is_zero_param(parameter)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape, whatever is held here."""
    return parameter.ds_shape if is_zero_param(parameter) else parameter.shape


def full_numel(parameter: nn.Parameter) -> int:
    """The whole parameter's number of elements."""
    return parameter.ds_numel if is_zero_param(parameter) else parameter.numel()


def shard_length(parameter: Tensor) -> int:
    """Elements of the parameter's shard, padding included; the same on every rank."""
    return int(parameter.ds_tensor.ds_numel)


def local_range(parameter: Tensor) -> tuple[int, int]:
    """[start, stop) of the flattened parameter held by this rank; empty on a rank that holds only padding."""
    length = shard_length(parameter)
    start = min(parameter.ds_zero_partition_rank * length, parameter.ds_numel)
    return start, min(start + length, parameter.ds_numel)


def boundaries(parameter: Tensor) -> list[int]:
    """Where the flattened parameter is cut between ranks; the same on every rank."""
    length = shard_length(parameter)
    return list(range(length, parameter.ds_numel, length))


def local_piece(parameter: Tensor) -> WeightPiece:
    """This rank's valid elements of a parameter, without padding: a view of the low-precision shard."""
    start, stop = local_range(parameter)
    return WeightPiece(parameter.ds_tensor.data[: stop - start], start)


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[int]:
    """Read the whole data of sharded parameters inside the context (collective). Yields the bytes received.

    Parameters that are resident already are left alone: gathering them "again" would end in freeing them.
    """
    away = [p for p in parameters if p.ds_status is not ZeroParamStatus.AVAILABLE]
    received = 0
    for p in away:
        received += (p.ds_numel - (local_range(p)[1] - local_range(p)[0])) * p.element_size()
    with deepspeed.zero.GatheredParameters(away, enabled=bool(away)):
        yield received


# --- gathering ----------------------------------------------------------------------------------------------------


def _replace_gathers(parameter: nn.Parameter) -> None:
    """Give a sharded parameter gathers that communicate less often; results and order are the engine's."""
    engine_gather = parameter.all_gather
    coalesced = parameter.all_gather_coalesced
    if torch.distributed.get_backend(parameter.ds_process_group) == "gloo":
        coalesced = _in_place(coalesced)
    coalesced = _frozen_once(coalesced)

    def all_gather(param_list: Iterable[nn.Parameter] | None = None, *args: Any, **options: Any) -> None:
        # The engine's own launches one collective per parameter, also for the hundreds of small ones that it gathers
        # after every optimizer step.
        wanted = [parameter] if param_list is None else list(param_list)
        if not all(_is_plain(p) for p in wanted):
            engine_gather(wanted, *args, **options)
        elif away := [p for p in wanted if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]:
            coalesced(away).wait()
            # The engine's own ends so, and relies on it: it gathers for the next forward on a stream of its own, which
            # nothing else orders after the optimizer's writes to the shards on this one. Not per micro-batch: after
            # an optimizer step, and per bucket of a norm refresh.
            get_accelerator().synchronize()

    parameter.all_gather_coalesced, parameter.all_gather = coalesced, all_gather


def _is_plain(parameter: nn.Parameter) -> bool:
    """Neither quantized for the gather (ZeRO++ qwZ) nor held twice (hpZ)."""
    return parameter.ds_secondary_tensor is None and not hasattr(parameter.ds_tensor, "ds_quant_scale")


def _frozen_once(coalesced: Callable[..., Any]) -> Callable[..., Any]:
    """A coalesced gather that communicates a persistent frozen parameter once, as long as it stays what it is.

    At every optimizer step the engine drops what all parameters hold, and gathers the persistent ones again, because
    the step may have changed them. It cannot have changed a frozen one: what came the first time is kept.
    """

    def gather(params: Iterable[nn.Parameter], **options: Any) -> Any:
        wanted = list(params)
        kept = [p for p in wanted if _kept_whole(p) is not None]
        missing = [p for p in wanted if _kept_whole(p) is None]
        return _FrozenOnce(coalesced(missing, **options) if missing else None, missing, kept)

    return gather


def _kept_whole(parameter: nn.Parameter) -> Tensor | None:
    """The whole data kept of a frozen parameter; None if it is trained by now, or its shard has been written since."""
    whole, version = getattr(parameter, "kept_whole", (None, 0))
    return whole if not parameter.requires_grad and version == parameter.ds_tensor._version else None


class _FrozenOnce:
    """A gather in flight, in the engine's own form."""

    def __init__(self, inner: Any, missing: Sequence[nn.Parameter], kept: Sequence[nn.Parameter]) -> None:
        self._inner, self._missing, self._kept = inner, missing, kept
        for p in kept:
            p.ds_status = ZeroParamStatus.INFLIGHT

    def wait(self, handle_dependency: bool = True) -> None:
        """Make the parameters available; called by the engine, more than once."""
        if self._inner is not None:
            self._inner.wait(handle_dependency=handle_dependency)
        for p in self._missing:
            if p.ds_persist and not p.requires_grad:
                p.kept_whole = p.data, p.ds_tensor._version
        for p in self._kept:
            p.data = p.kept_whole[0]
            p.ds_status = ZeroParamStatus.AVAILABLE
        self._missing, self._kept = [], []


IN_PLACE_BYTES = 2**20
"""Smaller parameters stay in the engine's bucket: one collective for all of them."""


def _in_place(coalesced: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's coalesced gather, with large parameters received where they will be used.

    Over gloo the engine fills a bucket, gloo another one inside, and torch.cat copies every parameter out of it: on
    a CPU the page faults of these buffers cost more than the transfer. NCCL gathers in place already.
    """

    def gather(params: Iterable[nn.Parameter], safe_mode: bool = False, quantize: bool = False) -> Any:
        ordered = sorted(params, key=lambda p: p.ds_id)
        large = [p for p in ordered if _is_large(p)]
        if quantize or not large:
            return coalesced(ordered, safe_mode=safe_mode, quantize=quantize)
        handles = [_InPlaceGather(large)]
        if small := [p for p in ordered if not _is_large(p)]:
            handles.append(coalesced(small, safe_mode=safe_mode))
        return MultipleAllGatherHandles(handles)

    return gather


def _is_large(parameter: nn.Parameter) -> bool:
    size = parameter.ds_numel * parameter.ds_tensor.element_size()
    return _is_plain(parameter) and size >= IN_PLACE_BYTES


class _InPlaceGather:
    """A gather in flight, in the engine's own form: every rank broadcasts its shard into place."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._wholes: list[tuple[nn.Parameter, Tensor]] = []
        self._works = []
        for p in params:
            assert p.ds_status is ZeroParamStatus.NOT_AVAILABLE
            p.ds_status = ZeroParamStatus.INFLIGHT
            whole = p.ds_tensor.new_empty(shard_length(p) * p.ds_zero_partition_world_size)
            for rank, part in enumerate(whole.split(shard_length(p))):
                if rank == p.ds_zero_partition_rank:
                    part.copy_(p.ds_tensor)
                source = dist.get_global_rank(p.ds_process_group, rank)
                self._works.append(dist.broadcast(part, source, group=p.ds_process_group, async_op=True))
            self._wholes.append((p, whole))

    def wait(self, handle_dependency: bool = True) -> None:
        """Make the parameters available; called by the engine, more than once."""
        for work in self._works:
            work.wait()
        for p, whole in self._wholes:
            p.data = whole[: p.ds_numel].view(p.ds_shape)
            p.ds_status = ZeroParamStatus.AVAILABLE
        self._works, self._wholes = [], []


# --- what an optimizer holds of a trainable parameter -------------------------------------------------------------

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


def read_state(parameter: nn.Parameter, key: str) -> Tensor:
    """This rank's valid elements of the fp32 master (MASTER) or of an Adam moment (0 before the first step), 1-D on the
    CPU or device.
    """
    start, stop = local_range(parameter)
    if key == MASTER:
        local = safe_get_local_fp32_param(parameter)
    elif _has_moment(parameter, key):
        local = safe_get_local_optimizer_state(parameter, key)
    else:  # no step has been taken yet
        local = torch.zeros_like(safe_get_local_fp32_param(parameter))
    return local.detach().flatten()[: stop - start]


def _has_moment(parameter: nn.Parameter, key: str) -> bool:
    zero3 = parameter._z3_optimizer
    sub_group = zero3.grad_position[zero3.get_param_id(parameter)][0]
    return key in zero3.optimizer.state.get(zero3.fp32_partitioned_groups_flat[sub_group], {})


def write_state(parameter: nn.Parameter, key: str, values: Tensor) -> None:
    """Write this rank's valid elements of the master or of a moment. The master reaches every copy of the parameter."""
    padded = _padded(parameter, values)
    if key == MASTER:
        safe_set_local_fp32_param(parameter, padded)
        parameter.ds_tensor.data.copy_(padded)
        _forget_copies(parameter)
    else:
        safe_set_local_optimizer_state(parameter, padded, key)


def _forget_copies(parameter: nn.Parameter) -> None:
    """Drop what else holds the parameter's old values, now that its shard is written: hpZ's second shard and whole
    copies. The next use gathers it from the shards. On every rank alike: the gather is collective.
    """
    parameter.ds_secondary_tensor = None
    if hasattr(parameter, "kept_whole"):
        del parameter.kept_whole
    if parameter.ds_status is ZeroParamStatus.AVAILABLE:
        parameter.ds_active_sub_modules.clear()
        free_param(parameter)


def _padded(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """A rank's valid elements as a whole shard, fp32."""
    padded = torch.zeros(shard_length(parameter), dtype=torch.float32, device=parameter.ds_tensor.device)
    padded[: values.numel()].copy_(values)
    return padded


def zero_elements(parameter: nn.Parameter, where: Tensor, moments: Sequence[str] = ()) -> None:
    """Set a parameter's elements to 0 where `where` (its shape, bool, whole): in the master, the low-precision shard
    and the resident copy; those of the named `moments` too. No communication.
    """
    # With offload, shard, master and moments are on different devices: each is masked where it is.
    start, stop = local_range(parameter)
    local = where.flatten()[start:stop]
    _zero(parameter.ds_tensor.data[: stop - start], local)
    parameter.ds_secondary_tensor = None
    if parameter.ds_status is ZeroParamStatus.AVAILABLE:
        _zero(parameter.data, where)
    if not local.any():
        return
    safe_set_local_fp32_param(parameter, _padded(parameter, _zero(read_state(parameter, MASTER).clone(), local)))
    for key in moments:
        write_state(parameter, key, _zero(read_state(parameter, key).clone(), local))


def _zero(values: Tensor, where: Tensor) -> Tensor:
    return values.masked_fill_(where.to(values.device, non_blocking=True), 0.0)


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer that steps an engine's master shards."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def step_was_skipped(engine: Any) -> bool:
    """Whether the last optimizer step was not taken, because a gradient is infinite or not a number; on every rank."""
    return bool(engine.optimizer.overflow)


def optimizer_step_count(engine: Any) -> int:
    """How many steps Adam's bias correction has counted."""
    states = [s for s in inner_optimizer(engine).state.values() if "step" in s]
    return int(states[0]["step"]) if states else 0


def create_optimizer_state(engine: Any, step: int) -> None:
    """Make Adam's state exist before the first step (zeros), so that it can be written, with `step` steps counted."""
    zero3 = engine.optimizer
    for flat in zero3.fp32_partitioned_groups_flat:
        zero3.optimizer.state[flat] = {
            "step": torch.tensor(float(step), dtype=torch.float32),
            **{key: torch.zeros_like(flat.data) for key in MOMENTS},
        }
