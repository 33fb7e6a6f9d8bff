"""Gathers and reductions of shards whose cost on the host does not grow with the number of ranks.

For every parameter of a gather and every rank, DeepSpeed makes one view of its buffer; for every gradient, parameter
and rank, another. With 1,024 ranks these loops are most of a step. Here a buffer is a matrix with a row for each rank,
and a parameter is some columns of it: one copy each, whatever the number of rows. Nothing else is different, so
results are the same to the last bit.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.partition_parameters import (
    AllGatherCoalescedHandle,
    MultipleAllGatherHandles,
    ZeroParamStatus,
    get_allgather_dtype,
)
from torch import Tensor, nn

ENGINES: tuple[str, ...] = ("0.19",)
"""DeepSpeed's versions that this file has been compared with. With others, DeepSpeed's own loops are used."""

ALONE_BYTES = 16 * 2**20
"""Parameters of this size have a collective of their own, which receives them where they will be used. A common one
needs a second copy of them in memory, and smaller ones would rather wait for each other than for another collective.
"""


def knows_engine() -> bool:
    """Whether this file knows the DeepSpeed that is installed."""
    return ".".join(deepspeed.__version__.split(".")[:2]) in ENGINES


def replace_reductions() -> None:
    """Let the engine average gradients by `reduce_scatter`. For the whole process; once is enough."""
    if knows_engine():
        stage3.reduce_scatter_coalesced = reduce_scatter


def flat_gathers(coalesced: Callable[..., Any], init: Any) -> Callable[..., Any]:
    """A coalesced gather in place of the engine's own, `coalesced`, of parameters that `init` (`zero.Init`) made.

    The engine's own does what this one does not: gathers of quantised shards, and those that its options ask to be
    done in another way (`stage3_use_all_reduce_for_fetch_params`, `stage3_allgather_sequential`).
    """
    if init.use_all_reduce_for_fetch_params:
        return _by_dtype(coalesced)
    if not knows_engine() or init.allgather_sequential:
        return coalesced

    def gather(params: Iterable[nn.Parameter], safe_mode: bool = False, quantize: bool = False) -> Any:
        ordered = sorted(params, key=lambda p: p.ds_id)  # as on every other rank
        if quantize or safe_mode or any(hasattr(_shard(p), "ds_quant_scale") for p in ordered):
            return coalesced(ordered, safe_mode=safe_mode, quantize=quantize)
        together: dict[Any, list[nn.Parameter]] = {}
        for p in ordered:
            if p.ds_status is not ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(f"a parameter is gathered that is not away: {p.ds_summary()}")
            p.ds_status = ZeroParamStatus.INFLIGHT
            together.setdefault(_bucket(p), []).append(p)
        return MultipleAllGatherHandles([_FlatGather(members) for members in together.values()])

    return gather


def _by_dtype(coalesced: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's gather by all-reduce, which takes one dtype: once for plain parameters, once for packed ones."""

    def gather(params: Iterable[nn.Parameter], safe_mode: bool = False, quantize: bool = False) -> Any:
        together: dict[torch.dtype, list[nn.Parameter]] = {}
        for p in sorted(params, key=lambda p: p.ds_id):
            together.setdefault(p.ds_tensor.dtype, []).append(p)
        handles = [coalesced(members, safe_mode=safe_mode, quantize=quantize) for members in together.values()]
        return handles[0] if len(handles) == 1 else MultipleAllGatherHandles(handles)

    return gather


def _shard(parameter: nn.Parameter) -> Tensor:
    """What this rank gives to a gather: its shard, or with hpZ the larger one that gathers within the node take."""
    in_node = parameter.ds_zero_param_process_group is not None and parameter.ds_secondary_tensor is not None
    return parameter.ds_secondary_tensor if in_node else parameter.ds_tensor


def _group(parameter: nn.Parameter) -> Any:
    in_node = _shard(parameter) is not parameter.ds_tensor
    return parameter.ds_zero_param_process_group if in_node else parameter.ds_process_group


def _sent_dtype(parameter: nn.Parameter) -> torch.dtype:
    """The dtype of the transfer, which torch.autocast can make another one than the shard's."""
    return get_allgather_dtype(parameter, _shard(parameter))


def _bucket(parameter: nn.Parameter) -> tuple[Any, ...]:
    """Equal for parameters that one collective gathers."""
    dtype = _sent_dtype(parameter)
    alone = parameter.ds_id if parameter.ds_numel * dtype.itemsize >= ALONE_BYTES else None
    return _group(parameter), dtype, alone


class _FlatGather:
    """A gather in flight, in the engine's own form: a row for each rank, columns for each parameter."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        group, dtype, device = _group(params[0]), _sent_dtype(params[0]), get_accelerator().current_device_name()
        shards = [_shard(p).to(device).to(dtype) for p in params]
        lengths = [len(shard) for shard in shards]
        rows = torch.empty(dist.get_world_size(group), sum(lengths), dtype=dtype, device=device)
        mine = rows[dist.get_rank(group)]
        torch.cat(shards, out=mine)
        work = dist.all_gather_into_tensor(rows.view(-1), mine, group=group, async_op=True)
        self._flying: tuple[Any, Tensor, list[tuple[nn.Parameter, Tensor]]] | None
        self._flying = work, rows, list(zip(params, rows.split(lengths, dim=1), strict=True))

    def wait(self, handle_dependency: bool = True) -> None:
        """Block (on an accelerator, its current stream) until the parameters can be used. The engine may call it more
        than once; without `handle_dependency` it keeps the buffers itself until its streams have met.
        """
        if self._flying is None:
            return
        (work, rows, received), self._flying = self._flying, None
        work.wait()
        for p, columns in received:
            whole = columns.reshape(-1)  # a copy, unless the columns are all there are
            p.data = whole[: p.ds_numel].view(p.ds_shape).to(p.ds_tensor.dtype)
            p.ds_status = ZeroParamStatus.AVAILABLE
        accelerator = get_accelerator()
        if not accelerator.is_synchronized_device():
            if handle_dependency:
                rows.record_stream(accelerator.current_stream())
            else:
                AllGatherCoalescedHandle.data_buffer.append([rows])


@torch.no_grad()
def reduce_scatter(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """Average gradients over ranks, each rank its own share of each: what `reduce_scatter_coalesced` of DeepSpeed does.

    `tensors` are contiguous and of one dtype; of each, 1-D, rank k gets elements [k·n, (k+1)·n), n = ceil(numel / world
    size), as far as there are any. A single tensor that needs no padding is divided in place.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    lengths = [-(-t.numel() // world) for t in tensors]
    if len(tensors) == 1 and tensors[0].numel() % world == 0:
        rows = tensors[0].view(world, -1)
    else:
        rows = tensors[0].new_empty(world, sum(lengths))
        for t, columns in zip(tensors, rows.split(lengths, dim=1), strict=True):
            _lay(t.view(-1), columns)
    rows.div_(world)
    dist.reduce_scatter_fn(rows[rank], rows.view(-1), group=group, async_op=False)
    owned = [max(0, min(t.numel() - rank * n, n)) for t, n in zip(tensors, lengths, strict=True)]
    return [part[:n] for part, n in zip(rows[rank].split(lengths), owned, strict=True)]


def _lay(values: Tensor, columns: Tensor) -> None:
    """Write flat values over columns (ranks, n), row after row; what is left of the last rows stays as it is."""
    full, rest = divmod(values.numel(), max(columns.shape[1], 1))
    columns[:full].copy_(values[: values.numel() - rest].view(full, -1))
    if rest:
        columns[full, :rest].copy_(values[values.numel() - rest :])
