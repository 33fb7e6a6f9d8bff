"""An adapter in our own format -> a PEFT folder, where PEFT can express its function as LoRA or DoRA.

That is so of DVoRA: with each layer's A scaled by d and its B by b it is a plain `use_dora` adapter, exactly. Such a
folder holds the matrices that all layers share once for each layer, so runs do not write it with every checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dora_dist.adapters.adapter_folder import described, storage_in_training, trained_of
from dora_dist.adapters.native_format import NativeFolder
from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.adapters.row_norms import row_norms
from dora_dist.adapters.storage import WeightStorage
from dora_dist.checkpoint.adapter_folders import open_adapter
from dora_dist.checkpoint.merge_plan import MergePlan, Output, plan_merge
from dora_dist.checkpoint.merging import base_for_peft, row_blocks, trained_on
from dora_dist.checkpoint.model_card import about_adapter, add_card, of_packed_base
from dora_dist.runtime.console import note
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import new_folder
from dora_dist.runtime.on_demand import OnDemand


def export_peft(adapter_folder: Path, base_folder: Path | str, output: Path, *, overwrite: bool = False) -> int:
    """Write an adapter that is in our own format as PEFT's; returns how many modules it has.

    Args:
        adapter_folder: of a run `RUN_DIR/checkpoint-STEP/adapter`.
        base_folder: a folder, or a hub name: PEFT has whole magnitudes, which are the base's row norms and an offset.
        output: the folder to write; it appears under its name once it is complete.

    Raises UserError, with nothing left behind, for an adapter in PEFT's own format, one that PEFT cannot express, a
    base that does not fit it, and an `output` that exists unless `overwrite`, that lies in an input or in a checkpoint,
    or that holds something else than an adapter.

    Memory: one layer in PEFT's form at a time.
    """
    adapter = open_adapter(adapter_folder)
    if not adapter.modules:
        raise UserError(
            f"{adapter.path}: adapts no layer, so there is nothing for PEFT; merge it (dora-dist consolidate)"
        )
    if not isinstance(adapter, NativeFolder):
        raise UserError(f"{adapter.path}: not an adapter in our own format, and no other is exported; use it as it is")
    for module, (method, _) in adapter.modules.items():
        if not method.expressible_in_peft:
            raise UserError(
                f"{adapter.path}: PEFT has nothing that computes what {method.title} does at {module!r}; merge it "
                "(dora-dist consolidate)"
            )
    base = base_for_peft(adapter, str(base_folder), output)
    storage = storage_in_training(adapter)
    plan = plan_merge(adapter, base, None)
    norms = {
        weight.module: _row_norms(weight, storage) if adapter.modules[weight.module][0].weight_decomposed else None
        for weight in plan.outputs
        if weight.module
    }
    method = max((method for method, _ in adapter.modules.values()), key=lambda method: method.r)
    exported = PeftAdapter(
        lora_alpha=method.lora_alpha,
        r=method.r or 1,
        dropout=method.dropout,
        use_dora=method.weight_decomposed,
        all_biases=_all_biases(plan, adapter),
        layers=OnDemand(norms, lambda module: _exported(adapter, module, norms[module])),
        trained=dict(trained_of(adapter)),
        **described(adapter),
    )
    about = about_adapter(adapter)
    with new_folder(Path(output), overwrite) as folder:
        write_peft_folder(folder, exported, overwrite=True)
        add_card(folder, about, replaced=Path(output))
    if packed := of_packed_base(about.storage):
        note(packed)
    return len(norms)


def _exported(adapter: NativeFolder, module: str, base_norm: Tensor | None) -> AdapterLayer:
    own = adapter.layer(module)
    layer = own.method.to_peft(own.shape, own.values, base_norm)
    assert layer is not None  # a native folder has no layer without parameters
    return layer


def _row_norms(weight: Output, storage: WeightStorage) -> Tensor:
    """Of a weight (out, in) as training saw it: (out,) fp32."""
    blocks = (block for _, block in row_blocks(weight, trained_on(weight, storage)))
    return torch.cat([row_norms(block).float() for block in blocks])


def _all_biases(plan: MergePlan, adapter: NativeFolder) -> bool:
    """Whether the model has biases and all of them were trained."""
    sources = [output.source for output in plan.outputs if output.name.rpartition(".")[2] == "bias"]
    return bool(sources) and all(source is adapter.tensors for source in sources)
