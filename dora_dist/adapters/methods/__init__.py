"""The methods of the package, and the one that a configuration or a PEFT folder asks for."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dora_dist.adapters.method import AdapterMethod, Method, Shape, registered
from dora_dist.adapters.methods.dynamic_rank import DynamicRank
from dora_dist.adapters.methods.full import FullFineTuning
from dora_dist.adapters.methods.lora import LowRank
from dora_dist.adapters.methods.mora import Mora
from dora_dist.adapters.methods.vera import Vera
from dora_dist.adapters.methods.weight_decomposed import NoUpdate, WeightDecomposed
from dora_dist.adapters.peft_layer import AdapterLayer, VeraLayer
from dora_dist.adapters.update import Update
from dora_dist.config.adapter import AdapterConfig
from dora_dist.runtime.errors import UserError

__all__ = [
    "DynamicRank",
    "FullFineTuning",
    "LowRank",
    "Mora",
    "NoUpdate",
    "Vera",
    "WeightDecomposed",
    "chosen",
    "for_one_model",
    "of_peft",
    "of_settings",
]


def chosen(adapter: AdapterConfig) -> Method:
    """The method of the adapter section. Raises UserError, naming the field, where it does not say one."""
    name = adapter.method or (DynamicRank if adapter.dynamic_rank else LowRank).name
    if name not in registered():
        remedy = f"name one of {', '.join(sorted(registered()))}, or add the module that registers it to plugins"
        raise UserError(f'adapter.method = "{name}": there is no such method; {remedy}')
    method = registered()[name].from_config(adapter)
    if (method.components is not None) != adapter.dynamic_rank:
        has, value = ("no components", "false") if adapter.dynamic_rank else ("components", "true")
        raise UserError(
            f"adapter.dynamic_rank = {'true' if adapter.dynamic_rank else 'false'}: the method {name!r} has "
            f"{has} to prune; set it to {value}"
        )
    if isinstance(method, Update) and adapter.weight_decomposed:
        return WeightDecomposed(method, adapter.dropout_mode, adapter.norm_gradient)
    return method


def for_one_model(methods: Mapping[str, AdapterMethod], shapes: Mapping[str, Shape]) -> dict[str, AdapterMethod]:
    """Each module's method, as one object for all modules that have the same (`AdapterMethod.for_model`)."""
    alike: list[tuple[AdapterMethod, list[str]]] = []
    for name, method in methods.items():
        names = next((names for known, names in alike if known == method), None)
        if names is None:
            alike.append((method, [name]))
        else:
            names.append(name)
    found: dict[str, AdapterMethod] = {}
    for method, names in alike:
        found |= dict.fromkeys(names, method.for_model([shapes[name] for name in names]))
    return {name: found[name] for name in methods}


def of_peft(theirs: AdapterLayer, dropout: float) -> AdapterMethod:
    """The method that a PEFT module was trained with, with its own rank and scaling."""
    update: Update = NoUpdate(dropout=dropout)
    if isinstance(theirs, VeraLayer):
        update = Vera(theirs.r, theirs.prng_key, dropout=dropout)
    elif theirs.r is not None:
        update = LowRank(theirs.r, theirs.scaling * theirs.r, dropout=dropout)
    return update if theirs.magnitude is None else WeightDecomposed(update)


def of_settings(settings: Mapping[str, Any], where: str) -> AdapterMethod:
    """The method whose `settings` these are. Raises UserError, which begins with `where`, if there is none."""
    name = settings.get("method")
    kind: Any = {**registered(), NoUpdate.name: NoUpdate}.get(name) if isinstance(name, str) else None
    if kind is None or not issubclass(kind, Update):
        remedy = "name the module that registers it in plugins"
        raise UserError(f"{where} = {name!r}: there is no such method here; {remedy}")
    try:
        section = AdapterConfig.model_fields.keys() & settings.keys() - {"method"}
        AdapterConfig(**{field: settings[field] for field in section})  # has their types and ranges
        update = kind(**{field.name: settings[field.name] for field in fields(kind) if field.compare})
        over = (settings["dropout_mode"], settings["norm_gradient"]) if settings["weight_decomposed"] else None
        method = update if over is None else WeightDecomposed(update, *over)
        if method.settings() == settings and math.isfinite(method.scaling):
            return method
    except (KeyError, TypeError, ValueError, ArithmeticError):
        pass  # what a method does with values that no run of it has written
    raise UserError(f"{where} = {dict(settings)!r}: not settings of the method {kind.name!r}; save the adapter again")
