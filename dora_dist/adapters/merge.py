"""An adapter merged into rows of its base weight."""

import torch
from torch import Tensor

from dora_dist.adapters.peft_layer import AdapterLayer


def merge_rows(weight: Tensor, layer: AdapterLayer, start: int) -> Tensor:
    """Merge `layer` into rows [start, start + len(weight)) of the base weight, fp32 (rows, in), in place.

    W = (m / n)[:, None]·(W0 + s·B·A), n = row norms of the bracket (Liu et al., section 4.1): a row needs only its own
    base row. A row of norm 0 is kept (factor 1), as in the adapted layer.
    """
    rows = slice(start, start + len(weight))
    if layer.lora_A is not None and layer.lora_B is not None:
        weight.addmm_(layer.lora_B[rows] * layer.scaling, layer.lora_A)
    if layer.magnitude is not None:
        norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)  # squares could overflow in fp32
        factor = torch.where(norm == 0, 1.0, layer.magnitude[rows] / norm)
        weight.mul_(factor[:, None].float())
    return weight
