"""Gathering ZeRO-3 parameters: with fewer collectives and copies than the engine needs, and for reading by hand."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import MultipleAllGatherHandles, ZeroParamStatus, free_param
from torch import Tensor, nn

from dora_dist.zero3.flat import flat_gathers
from dora_dist.zero3.partition import local_range, shard_length


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


def forget_copies(parameter: nn.Parameter) -> None:
    """Drop what still holds a parameter's old values after its shard was written: the second shard of hpZ
    (hierarchical partitioning, which keeps one in every node) and whole copies.

    The next use gathers it from the shards, so every rank must call this: the gather is collective.
    """
    parameter.ds_secondary_tensor = parameter.kept_whole = None
    if parameter.ds_status is ZeroParamStatus.AVAILABLE:
        parameter.ds_active_sub_modules.clear()
        free_param(parameter)


def replace_gathers(parameter: nn.Parameter, init: Any) -> None:
    """Give a sharded parameter that `init` (`zero.Init`) made gathers that communicate less often, and whose cost on
    the host does not grow with the number of ranks; results and order are the engine's.
    """
    engine_gather = parameter.all_gather
    coalesced = flat_gathers(parameter.all_gather_coalesced, init)
    few = parameter.ds_zero_partition_world_size <= IN_PLACE_RANKS
    if few and torch.distributed.get_backend(parameter.ds_process_group) == "gloo":
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
    """Whether the engine neither quantises it for the gather (qwZ of ZeRO++) nor holds a second shard (hpZ)."""
    return parameter.ds_secondary_tensor is None and not hasattr(parameter.ds_tensor, "ds_quant_scale")


def _frozen_once(coalesced: Callable[..., Any]) -> Callable[..., Any]:
    """A coalesced gather that communicates a persistent frozen parameter once, as long as it stays what it is.

    At every optimizer step the engine frees the data of all parameters, and gathers the persistent ones again because
    the step may have changed them. It cannot have changed a frozen one, so the result of its first gather is kept.
    """

    def gather(params: Iterable[nn.Parameter], **options: Any) -> Any:
        wanted = list(params)
        kept = [p for p in wanted if _kept_whole(p) is not None]
        missing = [p for p in wanted if _kept_whole(p) is None]
        return _FrozenOnce(coalesced(missing, **options) if missing else None, missing, kept)

    return gather


def _kept_whole(parameter: nn.Parameter) -> Tensor | None:
    """The whole data kept of a frozen parameter; None if there is none, if the parameter is trained by now, or if its
    shard has been written since.
    """
    if parameter.kept_whole is None or parameter.requires_grad:
        return None
    whole, version = parameter.kept_whole
    return whole if version == parameter.ds_tensor._version else None


class _FrozenOnce:
    """A gather in flight, in the engine's own form."""

    def __init__(self, inner: Any, missing: Sequence[nn.Parameter], kept: Sequence[nn.Parameter]) -> None:
        self._inner, self._missing, self._kept = inner, missing, kept
        for p in kept:
            p.ds_status = ZeroParamStatus.INFLIGHT

    def wait(self, handle_dependency: bool = True) -> None:
        """Block until the gathered parameters can be used. The engine may call it more than once."""
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
"""Smaller parameters stay in a common bucket, which needs one collective for all of them."""

IN_PLACE_RANKS = 16
"""With more ranks, one collective a parameter costs less than one for each of its shards."""


def _in_place(coalesced: Callable[..., Any]) -> Callable[..., Any]:
    """A coalesced gather, with large parameters received where they will be used.

    The gloo backend receives an all-gather in a buffer of its own: on a CPU its page faults cost more than the
    transfer. What one rank sends to another has none. NCCL has none either way.
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
    """A gather in flight, in the engine's own form: every rank sends its shard to every other, into place.

    Not broadcasts, which gloo runs one after the other, so that only one direction of a wire is in use at a time.
    """

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
                    continue
                other = dist.get_global_rank(p.ds_process_group, rank)
                self._works.append(dist.irecv(part, other, group=p.ds_process_group))
                self._works.append(dist.isend(p.ds_tensor, other, group=p.ds_process_group))
            self._wholes.append((p, whole))

    def wait(self, handle_dependency: bool = True) -> None:
        """Block until the gathered parameters can be used. The engine may call it more than once."""
        for work in self._works:
            work.wait()
        for p, whole in self._wholes:
            p.data = whole[: p.ds_numel].view(p.ds_shape)
            p.ds_status = ZeroParamStatus.AVAILABLE
        self._works, self._wholes = [], []
