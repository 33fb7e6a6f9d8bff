"""How the rows of weights trained in full have changed, from shards: the fp32 masters, and the same ranges of the base.

Each rank reads from the base's files the elements that its own shards hold, a few MiB at a time, so that there is no
second copy of a weight in memory. One all-reduce of three numbers per row puts the parts together.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dora_dist.adapters.pieces import rectangles
from dora_dist.adapters.row_changes import RowChange
from dora_dist.runtime.distributed import together
from dora_dist.weights.safetensors_io import TensorFolder
from dora_dist.zero3.optimizer_state import held_state
from dora_dist.zero3.partition import full_shape, local_range
from dora_dist.zero3.state_names import MASTER


class TrainedWeight(NamedTuple):
    """A sharded weight (out, in) that an engine trains, and the name of the tensor in the base that it started as."""

    parameter: nn.Parameter
    tensor: str


def row_changes(weights: Mapping[str, TrainedWeight], base: TensorFolder) -> dict[str, RowChange]:
    """How each weight's rows have changed (collective): W0 is what the model was loaded with, V the fp32 masters.

    What the model computes with is V rounded to its own format, which hides changes below a bf16's last digit.

    Raises UserError, on every rank, where one cannot read the base.
    """
    if not weights:
        return {}
    rows = [full_shape(weight.parameter)[0] for weight in weights.values()]
    flat = torch.zeros(3 * sum(rows), dtype=torch.float32, device=get_accelerator().current_device_name())
    sums = [part.view(3, -1) for part in flat.split([3 * count for count in rows])]
    remedy = "put the base's folder (model.path) back where it was, or set analysis.every to 0"
    with together(f"reading the base for the analysis ({remedy})"):
        for own, weight in zip(sums, weights.values(), strict=True):
            _add_local(own, weight, base)
    dist.all_reduce(flat)
    return {name: RowChange(*own) for name, own in zip(weights, sums, strict=True)}


def _add_local(sums: Tensor, weight: TrainedWeight, base: TensorFolder) -> None:
    """Add this rank's share of rowsum(W0²), rowsum(W0⊙ΔW) and rowsum(ΔW²) to `sums` (3, out), in place."""
    parameter, tensor = weight
    start, stop = local_range(parameter)
    master = held_state(parameter, MASTER)
    assert master is not None
    for block in rectangles(start, stop, full_shape(parameter)[1]):
        here = slice(block.offset, block.offset + block.rows * block.cols)
        read = base.read_flat(tensor, start + here.start, start + here.stop, dtype=parameter.dtype)
        w = read.to(sums.device).float().view(block.rows, block.cols)
        d = master[here].to(sums.device).view(block.rows, block.cols) - w
        sums[:, block.row : block.row + block.rows] += torch.stack(
            [(a * b).sum(1) for a, b in ((w, w), (w, d), (d, d))]
        )
