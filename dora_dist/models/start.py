"""A saved adapter as the starting point of a model: whether it fits, asked before a weight is read; then its values."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from dora_dist.adapters.adapter_folder import SavedAdapter, agrees
from dora_dist.adapters.held import HeldLinear
from dora_dist.adapters.layer import AdaptedLinear, adapted_layers
from dora_dist.adapters.peft_folder import warn_of_lacking
from dora_dist.adapters.storage import label
from dora_dist.models.heads import Head
from dora_dist.runtime.console import warn
from dora_dist.runtime.errors import UserError
from dora_dist.weights.placement import Placement


def check(
    model: nn.Module, trained: Mapping[str, torch.Size], adapter: SavedAdapter, *, base: Path, head: Head
) -> None:
    """Raise UserError where an adapter is not of the layers, ranks and shapes of an adapted `model`.

    `trained` are the shapes of its parameters that are trained, `base` and `head` what it was made of. Warns of what
    is odd and yet can be meant: another task, layers that are missing.
    """
    where = str(adapter.source.path) if adapter.source else "the adapter"
    layers = adapted_layers(model)
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | HeldLinear)]
    plain = [name for name in plain if name not in layers]
    _check_names(where, layers, adapter, base=base, plain=plain)
    for name, layer in layers.items():
        theirs = adapter.layers[name]
        if differ := ", ".join(adapter.differences(name, layer.method)):
            raise UserError(f"adapter.init_from: {where} has other settings than this run at {name!r}: {differ}")
        if not agrees(theirs.shape, layer.shape):
            raise UserError(
                f"{where}: it adapts {name!r} as {theirs.shape}, but {base} has it as {layer.shape}; give the base "
                "that it was trained on"
            )
    _check_trained(where, trained, adapter, sized_by=head.sized_by)
    for storage in {label(layer.storage) for layer in layers.values()} - {adapter.base_storage}:
        warn(
            f"{where} was trained with model.storage = {adapter.base_storage!r}, and this run has {storage!r}: it "
            "starts from another function of the base's weights; set model.storage to the adapter's one"
        )
    if adapter.task_type not in (None, head.peft_type):
        warn(
            f"{where} was trained with task_type={adapter.task_type}, and model.task = {head.task!r} is "
            f"{head.peft_type}: make sure that it is meant as a start for another task"
        )


def assign(model: nn.Module, adapter: SavedAdapter, placement: Placement) -> None:
    """Give a model the values of an adapter that fits it (`check`), once its norms are known.

    Modules trained in full that the adapter lacks (a new task's head) stay as they are.
    """
    for name, layer in adapted_layers(model).items():
        own = layer.adapter_parameters()
        for kind, values in adapter.values(name, layer.method, layer.base_norm).items():
            placement.assign(own[kind], values)
    for name, whole in adapter.trained.items():
        placement.assign(model.get_parameter(name), whole)


def _check_names(
    where: str, layers: Mapping[str, AdaptedLinear], adapter: SavedAdapter, *, base: Path, plain: Iterable[str]
) -> None:
    """`plain` are the linear layers of the model that are not adapted."""
    lacking = adapter.source.lacking([*plain, *layers]) if adapter.source else []
    if unknown := [name for name in adapter.layers if name not in layers and name not in plain]:
        raise UserError(
            f"{where}: it adapts {min(unknown)!r}, which {base} does not have; give the base that it was trained on"
        )
    endings = ", ".join(sorted({name.rpartition(".")[2] for name in adapter.layers}))
    as_theirs = f"set adapter.target_modules to the adapter's ({endings})"
    if absent := [name for name in layers if name not in adapter.layers]:
        more = f" and {len(absent) - 1:,} others" if len(absent) > 1 else ""
        remedy = "its target_modules name it, so the folder is not whole" if absent[0] in lacking else as_theirs
        raise UserError(
            f"adapter.init_from: {where} has no tensors for {absent[0]!r}{more}, which this run adapts; {remedy}"
        )
    if extra := [name for name in adapter.layers if name not in layers]:
        raise UserError(
            f"adapter.init_from: {where} adapts {extra[0]!r}, too, which this run does not adapt; {as_theirs}"
        )
    if lacking and adapter.source:
        warn_of_lacking(adapter.source.path, lacking)


def _check_trained(
    where: str, shapes: Mapping[str, torch.Size], adapter: SavedAdapter, *, sized_by: str | None
) -> None:
    source = adapter.source
    as_theirs = f"set {sized_by} to the adapter's, or " if sized_by else ""
    for name in adapter.trained:
        if name not in shapes:
            raise UserError(
                f"adapter.init_from: {name!r} was trained in full in {where} and is not here; name its module in "
                "adapter.trained_modules, or itself in adapter.trained_parameters"
            )
        theirs = source.tensors.entries[source.trained[name]].shape if source else adapter.trained[name].shape
        if shapes[name] != theirs:
            raise UserError(
                f"adapter.init_from: {name!r} has shape {list(theirs)} in {where} and {list(shapes[name])} here; "
                f"{as_theirs}give the base that it was trained on"
            )
