"""Adam's moments as bitsandbytes' 8-bit AdamW holds them, and as numbers.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022 (arXiv 2110.02861), section 2. A moment of a
flat fp32 shard is a code of 8 bits for each number, times the largest absolute value of its block of 256. Blocks are
counted from the start of the flat shard, so one block may have numbers of several parameters, and where it begins
depends on the number of ranks: checkpoints hold plain fp32 instead. Shards below 4,096 numbers keep fp32 moments.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 256
MOMENT_BYTES = 1 + 4 / BLOCK
"""Bytes of a moment per number."""


class _Names(NamedTuple):
    codes: str
    scales: str
    values: str
    """Of the 256 numbers that codes stand for."""


_NAMES = {"exp_avg": _Names("state1", "absmax1", "qmap1"), "exp_avg_sq": _Names("state2", "absmax2", "qmap2")}


def holds_codes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether moments of this optimizer are what this module reads; without importing bitsandbytes."""
    return type(optimizer).__module__.partition(".")[0] == "bitsandbytes"


def moment(state: Mapping[str, Any], key: str, start: int, stop: int) -> Tensor | None:
    """Elements [start, stop) of a moment in a flat shard's state, fp32: a view, or decoded from codes; None before the
    first step.
    """
    if key in state:
        held: Tensor = state[key][start:stop]
        return held
    names = _NAMES[key]
    if names.codes not in state:
        return None
    codes: Tensor = state[names.codes]
    if codes.dtype is not torch.uint8 or start == stop:
        return codes[start:stop].float()  # the same tensor, of fp32
    first, last = start // BLOCK, -(-stop // BLOCK)
    whole = codes[first * BLOCK : last * BLOCK]
    values: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        whole, state[names.scales][first:last], state[names.values], BLOCK, torch.float32
    )
    return values[start - first * BLOCK : stop - first * BLOCK]


def clear(state: Mapping[str, Any], key: str, start: int, where: Tensor) -> None:
    """Set the elements of a moment to 0 where `where` (n,) is, from element `start` on; no other one changes."""
    names = _NAMES[key]
    name = key if key in state else names.codes
    if name not in state:  # no step has been taken
        return
    held: Tensor = state[name][start : start + len(where)]
    where = where.to(held.device, non_blocking=True)
    if held.dtype is torch.uint8:
        zero = state[names.values].abs().argmin().to(torch.uint8)  # on the device: waits for nothing
        held.copy_(torch.where(where, zero, held))
    else:
        held.masked_fill_(where, 0.0)


def encode(optimizer: Any, group: int, flat: Tensor, *, step: int, moments: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state of a flat shard after `step` steps. moments: fp32, as long as `flat`, anywhere.

    `group` counts the parameter groups, whose "params" DeepSpeed leaves empty between steps.
    """
    settings = optimizer.param_groups[group]
    before, settings["params"] = settings["params"], [flat]
    optimizer.init_state(settings, flat, group, 0)
    settings["params"] = before
    state = optimizer.state[flat]
    state["step"] = step
    for key, values in moments.items():
        names = _NAMES[key]
        held = state[names.codes]
        if held.dtype is torch.uint8:
            there = values.to(flat.device)
            codes, scales = torch.ops.bitsandbytes.quantize_blockwise(there, state[names.values], BLOCK)
            held.copy_(codes.view_as(held))
            state[names.scales].copy_(scales)
        else:
            held.copy_(values)
