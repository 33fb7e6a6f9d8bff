"""What a ZeRO-3 optimizer holds of a trainable parameter: its fp32 master and Adam's moments, as shards.

A trainable parameter exists up to three times: the fp32 master shard, the low-precision shard, and, for small
("persistent") parameters, a resident whole copy. Whoever writes one of them writes all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

from dora_dist.zero3 import eight_bit
from dora_dist.zero3.gather import forget_copies
from dora_dist.zero3.partition import local_range, local_values, shard_length
from dora_dist.zero3.state_names import MASTER, MOMENTS


def read_state(parameter: nn.Parameter, key: str) -> Tensor:
    """This rank's valid elements of the fp32 master (MASTER) or of an Adam moment (0 before the first step), 1-D on the
    CPU or device.
    """
    start, stop = local_range(parameter)
    local = safe_get_local_fp32_param(parameter) if key == MASTER else held_state(parameter, key)
    if local is None:  # no step has been taken yet
        local = torch.zeros_like(safe_get_local_fp32_param(parameter))
    return local.detach().flatten()[: stop - start]


def master_or_shard(parameter: nn.Parameter) -> Tensor:
    """This rank's valid elements of the fp32 master; of the shard itself where no engine has made a master yet."""
    has_master = hasattr(parameter, "_z3_optimizer")
    return read_state(parameter, MASTER) if has_master else local_values(parameter)


def _place(parameter: nn.Parameter) -> tuple[Tensor, Any, int, int]:
    """The flat masters that a parameter's shard is part of, the optimizer's state of them, and the range in both."""
    start, stop = local_range(parameter)
    zero3 = parameter._z3_optimizer
    sub_group, first, _ = zero3.grad_position[zero3.get_param_id(parameter)]
    flat = zero3.fp32_partitioned_groups_flat[sub_group]
    return flat, zero3.optimizer.state.get(flat, {}), first, first + stop - start


def held_state(parameter: nn.Parameter, key: str) -> Tensor | None:
    """As `read_state`, where the engine holds it, on the device or offloaded to the host: a view, nothing is copied.

    A moment in 8 bits is decoded, and None before the first step.
    """
    flat, state, first, last = _place(parameter)
    if key == MASTER:
        return flat.detach()[first:last]
    return eight_bit.moment(state, key, first, last)


def write_state(parameter: nn.Parameter, key: str, values: Tensor, offset: int = 0) -> None:
    """Write this rank's valid elements of the master or of a moment, from its own element `offset` on.

    Moments only within `new_optimizer_state`.
    The master reaches every copy of the parameter, so every rank writes one, be it of no elements.
    """
    place = slice(offset, offset + len(values))
    held = held_state(parameter, key)
    assert held is not None  # `new_optimizer_state` has made the moments
    held[place].copy_(values)
    if key == MASTER:
        parameter.ds_tensor.data[place].copy_(values)
        forget_copies(parameter)


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
    _, state, first, _ = _place(parameter)
    for key in moments:
        eight_bit.clear(state, key, first, local)


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


@contextmanager
def new_optimizer_state(engine: Any, step: int) -> Iterator[None]:
    """Make Adam's state exist before the first step (zeros), with `step` steps counted, to be written within this.

    Moments in 8 bits are written in fp32, in host memory, and encoded at the end: a block is encoded once, with all
    parameters in it.
    """
    zero3 = engine.optimizer
    codes = eight_bit.holds_codes(zero3.optimizer)
    states = zero3.optimizer.state
    for flat in zero3.fp32_partitioned_groups_flat:
        states.pop(flat, None)  # before the new moments ask for as much memory again
        device = "cpu" if codes else flat.device
        states[flat] = {
            "step": torch.tensor(float(step), dtype=torch.float32),
            **{key: torch.zeros_like(flat.data, device=device) for key in MOMENTS},
        }
    yield
    if codes:
        for sub_group, flat in enumerate(zero3.fp32_partitioned_groups_flat):
            group = zero3.sub_group_to_group_id[sub_group]
            written = {key: values for key, values in states.pop(flat).items() if key in MOMENTS}
            eight_bit.encode(zero3.optimizer, group, flat, step=step, moments=written)
