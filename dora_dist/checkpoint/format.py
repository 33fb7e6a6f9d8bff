"""What a checkpoint is, and resuming from one: a form that does not know the world size (`saving.py` writes it).

A checkpoint holds, per trainable parameter, the whole fp32 master and both Adam moments, and nothing of the base.
Resuming reads each rank's own byte ranges, as loading a base model does.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dora_dist.adapters.components import Budget, ComponentPruner, PruningEvent
from dora_dist.adapters.layer import adapted_layers
from dora_dist.checkpoint.manifest import read_manifest
from dora_dist.checkpoint.state import KEYS, Headers, as_one, read_headers
from dora_dist.runtime.distributed import together
from dora_dist.runtime.errors import UserError
from dora_dist.zero3.optimizer_state import new_optimizer_state, write_state
from dora_dist.zero3.partition import full_shape, local_range

Survivors = Mapping[str, Tensor]
"""Gated layers' names with the indices of the components that are left."""

PIECE = 1 << 22
"""Elements that are read or written at a time: memory is that of one piece, 16 MB, however large a shard is."""
_BUDGET_FIELDS = {
    "r": "adapter.r",
    "start_r": "adapter.start_rank_factor",
    "first": "adapter.prune_start (or the number of steps)",
    "last": "adapter.prune_stop (or the number of steps)",
    "every": "adapter.prune_every",
    "schedule": "adapter.prune_schedule",
}


def load_checkpoint(folder: Path, engine: Any, model: nn.Module) -> dict[str, Any]:
    """Restore masters, moments and the optimizer's step count from a checkpoint, at any world size (collective).

    Returns the manifest. Raises UserError on every rank for an incomplete checkpoint, or one of another model.
    Checksums are not looked at here: they read every byte, and one rank has compared them already.
    """
    manifest: dict[str, Any] = {}
    headers: list[Headers] = [{}]
    with together(f"opening {folder}"):
        manifest = read_manifest(folder, verify=False)
        _check_identity(folder, manifest, model)
        if dist.get_rank() == 0:  # every rank of many would open every other's file
            headers = [read_headers(folder, manifest["files"])]
    dist.broadcast_object_list(headers)
    with together(f"resuming from {folder}"), new_optimizer_state(engine, manifest["optimizer_steps"]):
        source = as_one(folder, headers[0], manifest["model"]["trainable"])
        for name, parameter in trainable(model):
            start, stop = local_range(parameter)
            for key in KEYS:
                for first in range(start, stop, PIECE) or [start]:  # a rank that holds nothing takes part as well
                    values = source.read_flat(f"{name}.{key}", first, min(first + PIECE, stop))
                    write_state(parameter, key, values, offset=first - start)
    return manifest


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
    """Raise UserError if a checkpoint was pruned, or is to be pruned, by another budget than this."""
    theirs = manifest.get("components", {}).get("budget", {})  # without: another adapter, as `load_checkpoint` says
    for field, value in asdict(budget).items():
        if theirs.get(field, value) != value:
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


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def component_owners(model: nn.Module) -> dict[str, str]:
    """The layer of every parameter whose last dimension counts prunable components, by the parameter's name."""
    layers = adapted_layers(model).items()
    return {f"{name}.{kind}": name for name, layer in layers for kind in layer.method.components or ()}


def stored_shapes(model: nn.Module, survivors: Survivors) -> dict[str, tuple[int, ...]]:
    """Shapes of what is written of each trainable parameter; a layer without survivors lacks its factors."""
    shapes, owners = {}, component_owners(model)
    for name, parameter in trainable(model):
        shape, kept = tuple(full_shape(parameter)), survivors.get(owners.get(name, ""))
        if kept is None:
            shapes[name] = shape
        elif len(kept):
            shapes[name] = (*shape[:-1], len(kept))
    return shapes


def adapter_ranks(model: nn.Module, survivors: Survivors) -> dict[str, int]:
    return {
        name: len(survivors[name]) if name in survivors else layer.method.r
        for name, layer in adapted_layers(model).items()
    }


def identity(model: nn.Module, survivors: Survivors) -> dict[str, Any]:
    """What must agree for a checkpoint to belong to a model: trainable shapes, and the base's mean row norms."""
    scalings = {n: layer.method.scaling for n, layer in adapted_layers(model).items() if layer.method.r}
    norms = {n: float(m.base_norm.mean()) for n, m in adapted_layers(model).items() if m.base_norm is not None}
    return {
        "trainable": {n: list(shape) for n, shape in stored_shapes(model, survivors).items()},
        "base_norms": norms,
        "scalings": scalings,
        "shared": sorted({layer.method.shared_digest() for layer in adapted_layers(model).values()} - {""}),
    }


def _check_identity(folder: Path, manifest: dict[str, Any], model: nn.Module) -> None:
    theirs, ours = manifest["model"], identity(model, {})
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
                f"is {scaling:g}; set adapter.lora_alpha, adapter.r and adapter.component_scale back (of runs that did "
                'not have the last: "paper"), or start a new run with adapter.init_from'
            )
    if theirs.get("shared", ours["shared"]) != ours["shared"]:
        raise UserError(
            f"checkpoint.resume: {folder} was trained with other shared matrices than this version of torch draws "
            f"({', '.join(theirs['shared'])} there, {', '.join(ours['shared'])} here); resume with the torch of then"
        )
    for name, norm in ours["base_norms"].items():
        if abs(theirs["base_norms"][name] - norm) > 1e-3 * abs(norm):
            raise UserError(
                f"checkpoint.resume: {folder} was trained on another base: the mean row norm of {name!r} is "
                f"{theirs['base_norms'][name]:.6g} there and {norm:.6g} here; set model.path to the base it was "
                "trained on"
            )
