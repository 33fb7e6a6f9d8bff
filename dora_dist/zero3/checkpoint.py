"""Saving and resuming what trains, in a form that does not know the world size.

A checkpoint holds, per trainable parameter, the whole fp32 master and both Adam moments, and nothing of the base.
Saving gathers one tensor at a time and rank 0 streams it to disk; resuming reads each rank's own byte ranges, as
loading a base model does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from dora_dist import run_folder
from dora_dist.adapters.components import Budget, ComponentPruner, PruningEvent
from dora_dist.adapters.linear import AdapterSpec, DoraLinear
from dora_dist.adapters.peft_format import AdapterLayer, PeftAdapter, write_peft_folder
from dora_dist.distributed import together
from dora_dist.errors import UserError
from dora_dist.models.tasks import LANGUAGE_MODEL, PEFT_TYPES, Task, kept_config
from dora_dist.safetensors_io import TensorFolder, TensorWriter, new_folder
from dora_dist.zero3 import shards
from dora_dist.zero3.loading import adapted_layers

Survivors = Mapping[str, Tensor]
"""Gated layers' names with the indices of the components that are left."""

KEYS = (shards.MASTER, *shards.MOMENTS)
_BUDGET_FIELDS = {
    "r": "adapter.r",
    "start_r": "adapter.start_rank_factor",
    "first": "adapter.prune_start (or the number of steps)",
    "last": "adapter.prune_stop (or the number of steps)",
    "every": "adapter.prune_every",
    "schedule": "adapter.prune_schedule",
}


def save_checkpoint(
    folder: Path,
    engine: Any,
    model: nn.Module,
    *,
    spec: AdapterSpec,
    base_model: str,
    revision: str | None = None,
    task: Task = LANGUAGE_MODEL,
    trained_modules: Sequence[str] = (),
    fields: dict[str, Any],
    trainer_state: dict[str, Any],
    survivors: Survivors | None = None,
) -> None:
    """Write a checkpoint folder and the adapter in PEFT's format inside it (collective).

    `trained_modules` are those trained in full: PEFT's modules_to_save. `fields` join the manifest (step, position in
    the data, evaluation loss; plain JSON). With `survivors`, only those components of the gated layers they name are
    written, as of a model that never had the others. The folder appears under its name only when complete. Raises
    UserError on every rank if rank 0 cannot write it.
    """
    survivors = survivors or {}
    state = _gather_state(model)
    count = shards.optimizer_step_count(engine)
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            with new_folder(folder, overwrite=True) as partial:
                masters = _write_state(partial / run_folder.STATE, model, state, survivors)
                adapter = _peft_adapter(model, masters, spec, base_model, revision)
                adapter.task_type, adapter.model_config = PEFT_TYPES[task.name], kept_config(model, task)
                adapter.modules_to_save = list(trained_modules)
                write_peft_folder(partial / run_folder.ADAPTER, adapter)
                (partial / run_folder.TRAINER_STATE).write_text(json.dumps(trainer_state, indent=2))
                identity = {
                    "optimizer_steps": count,
                    "model": _identity(model, survivors),
                    "adapter": asdict(spec),
                    "adapter_ranks": _ranks(model, survivors),
                }
                run_folder.write_manifest(partial, {**fields, **identity})
        except Exception as error:  # raised on every rank below
            failure = error
    for _ in state:  # the other ranks, and rank 0 after a failure, take part in the remaining gathers
        pass
    with together(f"saving {folder}"):
        if failure is not None:
            raise failure


def load_checkpoint(folder: Path, engine: Any, model: nn.Module) -> dict[str, Any]:
    """Restore masters, moments and the optimizer's step count from a checkpoint, at any world size (collective).

    Returns the manifest. Raises UserError on every rank for a damaged checkpoint, or one of another model.
    """
    manifest: dict[str, Any] = {}
    with together(f"resuming from {folder}"):
        # Checksums once, on rank 0: they read every byte, and all ranks read the same files.
        manifest = run_folder.read_manifest(folder, verify=dist.get_rank() == 0)
        _check_identity(folder, manifest, model)
        source = TensorFolder.open(folder / run_folder.STATE)
        shards.create_optimizer_state(engine, manifest["optimizer_steps"])
        for name, parameter in _trainable(model):
            start, stop = shards.local_range(parameter)
            for key in KEYS:
                shards.write_state(parameter, key, source.read_flat(f"{name}.{key}", start, stop))
    return manifest


def load_weights(folder: Path, model: nn.Module) -> None:
    """Restore the masters alone (and every copy of them), leaving the optimizer's moments as they are (collective)."""
    with together(f"reading {folder}"):
        source = TensorFolder.open(folder / run_folder.STATE)
        for name, parameter in _trainable(model):
            start, stop = shards.local_range(parameter)
            shards.write_state(parameter, shards.MASTER, source.read_flat(f"{name}.{shards.MASTER}", start, stop))


def pruner_state(pruner: ComponentPruner) -> dict[str, Any]:
    """What a pruner has found out, for the manifest; plain JSON, and fp64 survives it bit for bit."""
    return {
        "budget": asdict(pruner.budget),
        "step": pruner.step,
        "scores": {name: scores.tolist() for name, scores in pruner.scores.items()},
        "pruned": {name: pruned.tolist() for name, pruned in pruner.pruned.items()},
        "events": [asdict(event) for event in pruner.events],
    }


def check_budget(folder: Path, manifest: dict[str, Any], budget: Budget) -> None:
    """Raise UserError, on every rank, unless a checkpoint was pruned, or is to be pruned, by this budget."""
    theirs = manifest["components"]["budget"]
    for field, value in asdict(budget).items():
        if theirs[field] != value:
            raise UserError(
                f"checkpoint.resume: {folder} was pruned by another budget: {_BUDGET_FIELDS[field]} gives {field} = "
                f"{theirs[field]} there and {value} here; set it back, or start a new run"
            )


def load_pruner(manifest: dict[str, Any], pruner: ComponentPruner) -> None:
    """Go on as `pruner_state` says."""
    state = manifest["components"]
    pruner.load(
        state["step"],
        {name: torch.tensor(scores, dtype=torch.float64) for name, scores in state["scores"].items()},
        {name: torch.tensor(pruned) for name, pruned in state["pruned"].items()},
    )
    pruner.events = [PruningEvent(**event) for event in state["events"]]


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _gather_state(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Each trainable parameter's (name, key, whole fp32 tensor), one at a time; collective at every step."""
    for name, parameter in _trainable(model):
        for key in KEYS:
            local = shards.read_state(parameter, key)
            length = -(-shards.full_numel(parameter) // dist.get_world_size())
            padded = torch.zeros(length, dtype=torch.float32, device=local.device)
            padded[: local.numel()] = local
            whole = torch.empty(length * dist.get_world_size(), dtype=torch.float32, device=local.device)
            dist.all_gather_into_tensor(whole, padded)
            yield name, key, whole[: shards.full_numel(parameter)].view(shards.full_shape(parameter))


def _write_state(
    path: Path, model: nn.Module, state: Iterator[tuple[str, str, Tensor]], survivors: Survivors
) -> dict[str, Tensor]:
    """Stream the state to a safetensors file; returns the masters by parameter name, on the CPU."""
    shapes = _shapes(model, survivors)
    layout = [(f"{name}.{key}", torch.float32, shape) for name, shape in shapes.items() for key in KEYS]
    masters = {}
    with TensorWriter(path, layout, metadata={"format": "pt"}) as writer:
        for name, key, whole in state:
            if name not in shapes:
                continue
            kept = survivors.get(_gated_layer(name))
            if kept is not None:
                whole = whole[..., kept.to(whole.device)].contiguous()
            writer.write(f"{name}.{key}", whole)
            if key == shards.MASTER:
                masters[name] = whole.cpu()
    return masters


def _peft_adapter(
    model: nn.Module, masters: dict[str, Tensor], spec: AdapterSpec, base_model: str, revision: str | None
) -> PeftAdapter:
    adapted = adapted_layers(model)
    layers = {name: _peft_layer(name, layer, masters) for name, layer in adapted.items()}
    return PeftAdapter(
        base_model=base_model,
        lora_alpha=spec.lora_alpha,
        r=spec.r or 1,
        dropout=spec.dropout,
        use_dora=spec.weight_decomposed,
        layers={name: layer for name, layer in layers.items() if layer is not None},
        revision=revision,
        trained={name: values for name, values in masters.items() if name.rpartition(".")[0] not in adapted},
    )


def _peft_layer(name: str, layer: DoraLinear, masters: dict[str, Tensor]) -> AdapterLayer | None:
    """A layer as PEFT knows it: gates folded into B, without the pruned components. None if nothing is left."""
    lora_A, lora_B = masters.get(f"{name}.lora_A"), masters.get(f"{name}.lora_B")
    gates = masters.get(f"{name}.lora_gates")
    if gates is not None and lora_A is not None and lora_B is not None:
        kept = gates.nonzero()[:, 0]
        lora_A, lora_B = (lora_A[:, kept], lora_B[:, kept] * gates[kept]) if len(kept) else (None, None)
    magnitude = None
    if layer.base_norm is None and lora_A is None:
        return None
    if layer.base_norm is not None:
        magnitude = layer.base_norm.cpu() + masters[f"{name}.magnitude_offset"]
    return AdapterLayer(
        lora_A=None if lora_A is None else lora_A.t().contiguous(),
        lora_B=lora_B,
        magnitude=magnitude,
        scaling=layer.spec.scaling,
        in_features=layer.in_features,
    )


def _gated_layer(name: str) -> str:
    """The layer whose components a parameter belongs to: their number is its last dimension. "" for any other."""
    layer, _, kind = name.rpartition(".")
    return layer if kind in ("lora_A", "lora_B", "lora_gates") else ""


def _shapes(model: nn.Module, survivors: Survivors) -> dict[str, tuple[int, ...]]:
    """Shapes of what is written of each trainable parameter; a layer without survivors has no factors."""
    shapes = {}
    for name, parameter in _trainable(model):
        shape, kept = tuple(shards.full_shape(parameter)), survivors.get(_gated_layer(name))
        if kept is None:
            shapes[name] = shape
        elif len(kept):
            shapes[name] = (*shape[:-1], len(kept))
    return shapes


def _ranks(model: nn.Module, survivors: Survivors) -> dict[str, int]:
    return {
        name: len(survivors[name]) if name in survivors else layer.spec.r or 0
        for name, layer in adapted_layers(model).items()
    }


def _identity(model: nn.Module, survivors: Survivors) -> dict[str, Any]:
    """What must agree for a checkpoint to belong to a model: trainable shapes, and the base's mean row norms."""
    scalings = {n: layer.spec.scaling for n, layer in adapted_layers(model).items() if layer.spec.r}
    norms = {n: float(m.base_norm.mean()) for n, m in adapted_layers(model).items() if m.base_norm is not None}
    return {
        "trainable": {n: list(shape) for n, shape in _shapes(model, survivors).items()},
        "base_norms": norms,
        "scalings": scalings,
    }


def _check_identity(folder: Path, manifest: dict[str, Any], model: nn.Module) -> None:
    theirs, ours = manifest["model"], _identity(model, {})
    if theirs["trainable"] != ours["trainable"]:
        names = set(theirs["trainable"]) ^ set(ours["trainable"]) or {
            n for n, shape in ours["trainable"].items() if theirs["trainable"][n] != shape
        }
        name = min(names)
        raise UserError(
            f"checkpoint.resume: {folder} is of another model or adapter: {name!r} is "
            f"{theirs['trainable'].get(name, 'absent')} there and {ours['trainable'].get(name, 'absent')} here; "
            "resume with the configuration that wrote it"
        )
    for name, scaling in ours["scalings"].items():
        if abs(theirs.get("scalings", {}).get(name, scaling) - scaling) > 1e-6 * scaling:
            raise UserError(
                f"checkpoint.resume: {folder} scales the update of {name!r} by {theirs['scalings'][name]:g}, here it "
                f"is {scaling:g}; set adapter.lora_alpha and adapter.r back, or start anew with adapter.init_from"
            )
    for name, norm in ours["base_norms"].items():
        if abs(theirs["base_norms"][name] - norm) > 1e-3 * abs(norm):
            raise UserError(
                f"checkpoint.resume: {folder} was trained on another base: the mean row norm of {name!r} is "
                f"{theirs['base_norms'][name]:.6g} there and {norm:.6g} here; set model.path to the base it was "
                "trained on"
            )
