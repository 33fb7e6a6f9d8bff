"""Sums over tokens in fp32, without fp32 copies of whole activations."""

import torch
from torch import Tensor


def column_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_t a⊙b over rows, fp32 (columns,); the fp32 temporary is at most 64 MiB, and on a CPU fits the cache."""
    max_rows = max(1, (2**17 if a.device.type == "cpu" else 2**24) // a.shape[1])
    total = torch.zeros(a.shape[1], dtype=torch.float32, device=a.device)
    for rows_a, rows_b in zip(a.split(max_rows), b.split(max_rows), strict=True):
        total += (rows_a.float() * rows_b).sum(0)
    return total
