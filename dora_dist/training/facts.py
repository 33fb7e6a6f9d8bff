"""What the history says of a start of a run: on what it runs, from where it goes on, and what is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from dora_dist.data import TokenizedData
from dora_dist.models.build import AdaptedModel
from dora_dist.runtime.agreement import versions
from dora_dist.runtime.distributed import World
from dora_dist.zero3.partition import full_numel


def of_start(world: World, *, steps: int, checkpoint: Path | None, changed: Mapping[str, str]) -> dict[str, Any]:
    """Of a start that is to take `steps` optimizer steps in all, from `checkpoint` on."""
    device = get_accelerator().device_name()
    return {
        "steps": steps,
        "resumed_from": None if checkpoint is None else str(checkpoint),
        "changed": dict(changed),
        "ranks": world.world_size,
        "nodes": -(-world.world_size // world.local_world_size),
        "host": world.host,
        "launcher": world.launcher,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "collectives": dist.get_backend(),
        "versions": versions(),
    }


def of_data(data: TokenizedData) -> dict[str, Any]:
    """Of records that are left out because they cannot be used, by set, where there are any."""
    sets = {"data.train": data.train, "data.validation": data.validation}
    bad = {name: each.bad for name, each in sets.items() if each is not None and each.bad}
    return {"bad_records": bad} if bad else {}


def of_model(run: AdaptedModel) -> dict[str, Any]:
    """Of a model as it is trained: again where pruning has made it smaller."""
    trained = sum(full_numel(p) for p in run.model.parameters() if p.requires_grad)
    return {
        "class": type(run.model).__name__,
        "parameters": run.weights,
        "trained_parameters": trained,
        "adapted_layers": len(run.adapted),
        "trained_in_full": [*run.trained, *run.trained_parameters.names],
    }
