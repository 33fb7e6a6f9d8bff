"""MoRA's ΔW as its definition reads: what it makes of each unit vector; rotations are products of complex numbers."""

import math

import torch
from torch import Tensor


def change(shape: tuple[int, int], matrix: Tensor, kind: int) -> Tensor:
    """ΔW (out, in), differentiable, in the matrix's dtype."""
    out_features, in_features = shape
    size = len(matrix)
    groups = math.ceil(in_features / size)
    inputs = torch.eye(in_features, dtype=matrix.dtype)
    inputs = torch.cat((inputs, inputs.new_zeros(in_features, groups * size - in_features)), dim=1)
    inputs = inputs.view(in_features, groups, size)
    if kind == 1:
        outputs = inputs.sum(1) @ matrix.T
    else:
        one, two = inputs[..., : size // 2].double(), inputs[..., size // 2 :].double()
        speeds = torch.tensor([10000 ** (-2 * q / size) for q in range(size // 2)], dtype=torch.float64)
        angles = torch.arange(groups)[:, None] * speeds
        turned = torch.complex(one, two) * torch.polar(torch.ones_like(angles), angles)
        outputs = (torch.cat((turned.real, turned.imag), dim=-1).to(matrix.dtype) @ matrix.T).flatten(1)
    times = math.ceil(out_features / outputs.shape[1])
    return outputs.repeat(1, times)[:, :out_features].T
