"""Modules of a model in rows and columns: a row per layer of the model, a column per kind of module."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Grid(NamedTuple):
    """`places` has each module's row and column, numbers into `layers` and `kinds`."""

    layers: list[str]
    kinds: list[str]
    places: Mapping[str, tuple[int, int]]


def grid(modules: Iterable[str]) -> Grid:
    """Where modules belong, by their names; layers of several stacks are told apart ("encoder 0")."""
    found = {name: _parts(name) for name in modules}
    stacks = [stack.split(".") for stack in dict.fromkeys(stack for stack, _, _ in found.values())]
    shared = set.intersection(*map(set, stacks)) if stacks else set()
    named = {}
    for name, (stack, number, kind) in found.items():
        own = [part for part in stack.split(".") if part not in shared]  # "encoder", where there is a decoder too
        named[name] = (" ".join([*own, number]), kind)
    layers = list(dict.fromkeys(layer for layer, _ in named.values()))
    kinds = list(dict.fromkeys(kind for _, kind in named.values()))
    return Grid(
        layers, kinds, {name: (layers.index(layer), kinds.index(kind)) for name, (layer, kind) in named.items()}
    )


def _parts(name: str) -> tuple[str, str, str]:
    """ "model.layers.3.self_attn.q_proj" -> ("model.layers", "3", "q_proj"): a stack of layers, a layer, a module."""
    match = re.search(r"\.(\d+)\.(.+)$", name)
    if match is None:
        return "", "-", name
    return name[: match.start()], match[1], match[2].removeprefix("self_attn.").removeprefix("mlp.")
