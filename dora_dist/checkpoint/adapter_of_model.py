"""A model's adapter as a folder that others read: in PEFT's format, or in our own where PEFT has none for the method.

A run's checkpoints have one each; `save_adapter` writes one of a model that a loop of the user's own has trained.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from dora_dist.adapters.adapter_folder import SavedAdapter
from dora_dist.adapters.folders import CONFIG_NAMES
from dora_dist.adapters.held import held_layers, packed_modules
from dora_dist.adapters.layer import AdaptedLinear, adapted_layers
from dora_dist.adapters.method import AdapterMethod, Method
from dora_dist.adapters.native_format import NativeAdapter, NativeLayer
from dora_dist.adapters.peft_format import PeftAdapter
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.adapters.storage import PLAIN, label
from dora_dist.adapters.trained_parameters import TrainedParameters
from dora_dist.models.build import AdaptedModel
from dora_dist.models.heads import CAUSAL_LM, Head
from dora_dist.runtime.distributed import together
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import check_output
from dora_dist.weights.safetensors_io import TensorFolder

OwnValues = Mapping[str, Mapping[str, Tensor]]
"""Of each adapted layer the method's parameters, as far as they are left: whole, fp32, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a checkpoint says of where it comes from, and its adapter, if the method has one. `trained_modules`: PEFT's
    modules_to_save; `files`: the tokenizer's, by name, for rank 0 alone. `run`: the configuration, for the model card.
    """

    method: Method
    base_model: str
    revision: str | None = None
    head: Head = CAUSAL_LM
    trained_modules: Sequence[str] = ()
    trained_parameters: TrainedParameters = field(default_factory=TrainedParameters)
    base_digest: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)


def save_adapter(
    run: AdaptedModel, folder: str | Path, *, base_model: str | None = None, overwrite: bool = False
) -> Path:
    """Write the adapter of a model from `build_model` as a folder that PEFT, `evaluate`, `consolidate` and
    `adapter.init_from` read; our own format for a method that PEFT does not have.

    Args:
        run: what `build_model` returned. Whoever trained it, its engine's fp32 values are saved where it has an
            engine. Collective: every rank calls it, if there are several, and rank 0 alone writes.
        folder: appears under its name once it is complete. It holds modules trained in full, too.
        base_model: what the folder says that its base is; None: the folder that the model was read from.
        overwrite: replace the adapter that is there.

    Returns: `folder`.

    Raises: UserError, on every rank and with nothing left behind, where `folder` exists (unless `overwrite`), holds
    something else than an adapter, or cannot be written, and for a model without adapters.
    """
    folder = Path(folder)
    layers, read = adapted_layers(run.model), run.placement.read
    if not layers:
        raise UserError(f"{folder}: the model has no adapter to save; write the model itself (save_pretrained)")
    own = {
        name: {kind: read(parameter) for kind, parameter in layer.adapter_parameters().items()}
        for name, layer in layers.items()
    }
    adapters = {f"{name}.{kind}" for name, values in own.items() for kind in values}
    rest = [(n, p) for n, p in run.model.named_parameters() if p.requires_grad and n not in adapters]
    trained = {name: read(parameter) for name, parameter in rest}
    ranks = dist.is_initialized()
    with together("saving the adapter") if ranks else nullcontext():
        if not ranks or dist.get_rank() == 0:
            check_output(folder, {"base": run.base}, what="an adapter", marks=CONFIG_NAMES)
            _adapter(run, own, trained, base_model).write(folder, overwrite=overwrite)
    return folder


def saved_adapter(
    model: nn.Module,
    method: AdapterMethod,
    origin: Origin,
    *,
    own: OwnValues,
    trained: Mapping[str, Tensor] | None = None,
    stored: dict[str, tuple[TensorFolder, str]] | None = None,
    held: Mapping[str, Any],
) -> SavedAdapter:
    """What trained, in PEFT's format, or in our own where PEFT has none for the method.

    `own` are the adapters' values; those of the base's parameters that were trained are in memory, `trained`, or in a
    state, `stored`; `held` is what `how_held` says.
    """
    adapted = adapted_layers(model)
    common: dict[str, Any] = {
        "base_model": origin.base_model,
        "revision": origin.revision,
        "task_type": origin.head.peft_type,
        "model_config": origin.head.kept_config(model),
        "modules_to_save": [*origin.trained_modules, *origin.trained_parameters.modules],
        "trained": trained or {},
        "stored": stored or {},
        "base_digest": origin.base_digest,
        **held,
    }
    if not method.in_peft:
        native = {n: NativeLayer(layer.method, layer.shape, own[n]) for n, layer in adapted.items()}
        return NativeAdapter(layers=native, **common)
    layers = {name: _peft_layer(layer, own[name]) for name, layer in adapted.items()}
    return PeftAdapter(
        lora_alpha=method.scaling * math.sqrt(method.r) if method.use_rslora else method.lora_alpha,
        r=method.r or 1,
        dropout=method.dropout,
        use_dora=method.weight_decomposed,
        use_rslora=method.use_rslora,
        all_biases=origin.trained_parameters.all_biases,
        layers={name: layer for name, layer in layers.items() if layer is not None},
        **common,
    )


def how_held(model: nn.Module) -> dict[str, Any]:
    """How a model's frozen weights are held, as an adapter's folder says it."""
    layers = held_layers(model).values()
    storage = next((label(layer.storage) for layer in layers if layer.storage is not PLAIN), PLAIN.name)
    return {"base_storage": storage, "base_packed": packed_modules(model)}


def _adapter(run: AdaptedModel, own: Any, trained: Any, base_model: str | None) -> SavedAdapter:
    method = max((layer.method for layer in adapted_layers(run.model).values()), key=lambda method: method.r)
    origin = Origin(
        method=method,
        base_model=str(run.base.resolve()) if base_model is None else base_model,
        head=run.head,
        trained_modules=run.trained,
        trained_parameters=run.trained_parameters,
        base_digest=run.base_digest,
    )
    return saved_adapter(run.model, method, origin, own=own, trained=trained, held=how_held(run.model))


def _peft_layer(layer: AdaptedLinear, own: Mapping[str, Tensor]) -> AdapterLayer | None:
    """A layer as PEFT knows it; None if nothing of it is left."""
    return layer.method.to_peft(layer.shape, own, None if layer.base_norm is None else layer.base_norm.cpu())
