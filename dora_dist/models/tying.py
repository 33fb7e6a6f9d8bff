"""Weights that a model holds under several names (a head that is the embedding), and adapters of one of these.

PEFT makes a copy of what an adapter trains, and the other names keep the base's weight: so it is here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dora_dist.models.names import locate


def parted_names(model: nn.Module, modules: Iterable[str]) -> list[tuple[list[str], list[str]]]:
    """Weights that some of `modules` share with the rest of the model: (names inside one module, all names), each."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shared = [names for names in owners.values() if len(names) > 1]
    inside = [([n for n in names if n.startswith(f"{module}.")], names) for module in modules for names in shared]
    return [(here, names) for here, names in inside if here and len(here) < len(names)]


def untie(model: Any, modules: Iterable[str], stored: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Give `modules` of a model on the meta device weights of their own where they share them, in place.

    Returns the names of these weights, and `stored` (`stored_names`) with the tensor that each of them starts from.
    The model's configuration says that its head is not tied, as PEFT has it.
    """
    sources, apart = dict(stored), []
    for here, names in parted_names(model, modules):
        weight = model.get_parameter(here[0])
        own = nn.Parameter(torch.empty_like(weight), weight.requires_grad)
        for name in here:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, own)
        if found := next(filter(None, (locate(n, stored, model.base_model_prefix) for n in names)), None):
            sources = dict.fromkeys(names, found) | sources
        apart += here
    if apart:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return apart, sources
