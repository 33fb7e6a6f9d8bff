"""The nearest plain LoRA to an adapter of any kind, for what reads no other: a singular value decomposition per layer.

The difference that an adapter makes to a weight, D = W − W0 (out, in), is cut to its R largest singular values: by
Eckart and Young no matrix of rank R is nearer. A magnitude changes every row of W0 by a factor, so D of DoRA has full
rank, and what is lost depends on the layer: it is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_dist.adapters.adapter_folder import AdapterFolder, described, storage_in_training, trained_of
from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.adapters.storage import WeightStorage
from dora_dist.checkpoint.adapter_folders import open_adapter
from dora_dist.checkpoint.merge_plan import Output, plan_merge
from dora_dist.checkpoint.merging import base_for_peft, row_blocks, trained_on
from dora_dist.runtime import console
from dora_dist.runtime.errors import UserError

EXACT_UP_TO = 1024
"""The smaller side up to which all singular values are computed; beyond it, a random projection finds the largest."""
_MORE, _ITERATIONS = 16, 6  # columns of the projection beyond R, and rounds of it


@dataclass(frozen=True)
class Nearest:
    """lora_A (r, in) and lora_B (out, r), fp32; ‖D‖ and ‖D − lora_B·lora_A‖, Frobenius norms."""

    lora_A: Tensor
    lora_B: Tensor
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """The share of the difference that is lost; 0 where there is no difference."""
        return self.lost / self.norm if self.norm else 0.0


def nearest(difference: Tensor, r: int, *, exact: bool | None = None) -> Nearest:
    """The nearest matrix of rank `r` to one (out, in), fp32; exact: None: by its size. The same at every call."""
    smaller = min(difference.shape)
    r = min(r, smaller)
    if smaller <= EXACT_UP_TO if exact is None else exact:
        U, S, Vh = torch.linalg.svd(difference, full_matrices=False)
        V = Vh.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(difference, q=min(r + _MORE, smaller), niter=_ITERATIONS)
    root = S[:r].sqrt()
    lora_A, lora_B = (V[:, :r] * root).T.contiguous(), (U[:, :r] * root).contiguous()
    lost = torch.addmm(difference, lora_B, lora_A, alpha=-1).norm()
    return Nearest(lora_A, lora_B, float(difference.norm()), float(lost))


def write_nearest_lora(
    adapter_folder: Path, base_folder: Path | str, folder: Path, *, r: int, progress: bool = True
) -> dict[str, Nearest]:
    """Write the PEFT folder `folder`, which may be there empty, of the nearest LoRA of rank `r`; what each module has.

    Weights are taken as training saw them, through the adapter's storage. Memory: the result, and one layer's weight
    three times in fp32. Raises UserError for an adapter without layers and for a base that does not fit it.
    """
    adapter = open_adapter(adapter_folder)
    if not adapter.modules:
        raise UserError(f"{adapter.path}: adapts no layer, so there is no LoRA of it; merge it (dora-dist consolidate)")
    base = base_for_peft(adapter, str(base_folder), folder)
    storage = storage_in_training(adapter)
    plan = plan_merge(adapter, base, None)
    adapter = adapter.of_base(plan.adapted)
    found = {}
    with console.progress(len(adapter.modules), "decomposing", " layers", shown=progress) as bar:
        for weight in plan.outputs:
            if weight.module:
                found[weight.module] = nearest(_difference(adapter, weight, storage), r)
                bar.update(1)
    layers = {name: AdapterLayer(each.lora_A, each.lora_B, None, 1.0) for name, each in found.items()}
    alike: dict[str, Any] = {**described(adapter), "trained": dict(trained_of(adapter))}
    widest = max(each.lora_A.shape[0] for each in found.values())
    exported = PeftAdapter(lora_alpha=widest, r=widest, dropout=0.0, use_dora=False, layers=layers, **alike)
    write_peft_folder(folder, exported, overwrite=True)
    return found


def error_of_all(found: dict[str, Nearest]) -> float:
    """The share of all layers' differences together that is lost."""
    norm = sqrt(sum(each.norm**2 for each in found.values()))
    return sqrt(sum(each.lost**2 for each in found.values())) / norm if norm else 0.0


def _difference(adapter: AdapterFolder, weight: Output, storage: WeightStorage) -> Tensor:
    """What an adapter adds to a weight: (out, in) fp32. Raises UserError where it is not finite."""
    layer = adapter.layer(weight.module or "")

    def rows() -> Iterator[Tensor]:
        for start, block in row_blocks(weight, trained_on(weight, storage)):
            before = block.clone()
            layer.merge_rows(block, start)
            yield block.sub_(before)

    difference = torch.cat(list(rows()))
    if not bool(torch.isfinite(difference.sum())):
        raise UserError(f"tensor {weight.name!r}: base, adapter or their sum is not finite; use an earlier checkpoint")
    return difference
