"""Weights that a model holds under several names (a head that is the embedding), and adapters of one of these.

As in PEFT, what an adapter trains becomes a copy of its own, and the other names keep the base's weight.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dora_dist.adapters.patterns import names_of_each
from dora_dist.runtime.console import warn
from dora_dist.weights.names import locate
from dora_dist.weights.safetensors_io import TensorFolder

_PIECE = 4 << 20  # elements


def parted_names(model: nn.Module, modules: Iterable[str]) -> list[tuple[list[str], list[str]]]:
    """Weights that some of `modules` share with the rest of the model: (names inside one module, all names), each."""
    shared = [names for names in names_of_each(model) if len(names) > 1]
    inside = [([n for n in names if n.startswith(f"{module}.")], names) for module in modules for names in shared]
    return [(here, names) for here, names in inside if here and len(here) < len(names)]


def names_of(model: nn.Module, name: str) -> list[str]:
    """All names of the parameter `name`; none where the model does not have it."""
    return next((names for names in names_of_each(model) if name in names), [])


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


def untie_different(model: Any, folder: TensorFolder, stored: Mapping[str, str]) -> tuple[list[str], Mapping[str, str]]:
    """Untie what config.json ties though `folder` has two different tensors for it, as transformers does; says so.

    The model is on the meta device and changed in place. Returns what `untie` does.
    """
    untied = []
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        own, shared = (locate(name, stored, model.base_model_prefix) for name in (target, source))
        if own is None or shared is None or own == shared or _equal(folder, own, shared):
            continue
        names, stored = untie(model, [target.rpartition(".")[0]], stored)
        untied += names
        warn(
            f"{folder.path / 'config.json'}: tie_word_embeddings = true, but the files hold {own!r} and {shared!r} "
            "with different values: each is used as it is, as transformers does; set tie_word_embeddings to false"
        )
    return untied, stored


def _equal(folder: TensorFolder, one: str, other: str) -> bool:
    """Whether two tensors of a folder hold the same; read piece by piece, up to the first that differs."""
    first, second = folder.entries[one], folder.entries[other]
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    spans = ((start, min(start + _PIECE, first.numel)) for start in range(0, first.numel, _PIECE))
    return all(torch.equal(folder.read_flat(one, *span), folder.read_flat(other, *span)) for span in spans)
