"""Which elements of a ZeRO-3 parameter a rank holds.

Rank k of W holds elements [k·P, min((k+1)·P, numel)) of a parameter's row-major flat tensor, P = ceil(numel / W).
The shard tensor has length P on every rank; what lies beyond the valid elements is padding, and some ranks hold
nothing but padding.
"""

import torch
from deepspeed.runtime.zero.utils import is_zero_param
from torch import Tensor, nn

from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.pieces import WeightPiece


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 owns this parameter."""
    return is_zero_param(parameter)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape, whatever is held here."""
    return parameter.ds_shape if is_zero_param(parameter) else parameter.shape


def full_numel(parameter: nn.Parameter) -> int:
    """The whole parameter's number of elements; of a packed weight, of its tensor and with padding."""
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


def local_values(parameter: Tensor) -> Tensor:
    """This rank's valid elements of a parameter, 1-D, without padding: a view of the low-precision shard."""
    start, stop = local_range(parameter)
    return parameter.ds_tensor.data[: stop - start]


def local_piece(layer: AdaptedLinear) -> WeightPiece:
    """This rank's piece of a layer's frozen weight: whole records of its storage."""
    held, stored = layer.held(), next(iter(layer.storage.tensors.values()))
    first_record = local_range(held[0])[0] // stored.elements
    return WeightPiece([local_values(parameter) for parameter in held], first_record * layer.storage.record)
