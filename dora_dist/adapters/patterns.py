"""What the patterns of a configuration name: modules and parameters of a model."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from torch import nn

from dora_dist.runtime.errors import UserError

TrainedParameters = Callable[[nn.Module], list[str]]
"""Given a model, the names of those of its own parameters that are trained as they are."""


def matches(pattern: str, name: str, field: str, *, apart: Sequence[str] = ()) -> bool:
    """Whether a pattern of `field` names a module or parameter: whole name, suffix at a dot, or expression."""
    if name == pattern:
        return True
    if name.endswith("." + pattern):
        return not set(parts_in(name, apart)).difference(parts_in(pattern, apart))
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is neither a module name nor a regular expression ({error})") from error


def trained_in_full(
    model: nn.Module,
    patterns: Sequence[str],
    field: str = "adapter.trained_modules",
    *,
    apart: Sequence[str] = (),
) -> list[str]:
    """The outermost modules with parameters that a pattern names (as in `by_pattern`), in the model's order.

    Raises UserError, naming the `field` of the patterns, if one matches none.
    """
    modules = [name for name, m in model.named_modules() if name and next(m.parameters(), None) is not None]
    matched: set[str] = set()
    for pattern in patterns:
        names = {name for name in modules if matches(pattern, name, field, apart=apart)}
        if not names:
            outer = ", ".join(name for name in modules if "." not in name)
            raise UserError(f"{field}: {pattern!r} matches no module with parameters; the outermost are: {outer}")
        matched |= names
    return outside((name for name in modules if name in matched), matched)


def parameters_matching(
    model: nn.Module, patterns: Sequence[str], field: str = "adapter.trained_parameters", *, apart: Sequence[str] = ()
) -> list[str]:
    """The parameters that a pattern names (as in `by_pattern`), in the model's order, each once however many names.

    Raises UserError, naming the `field` of the patterns, if one matches none.
    """
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    chosen: set[str] = set()
    for pattern in patterns:
        found = {own for name, own in names.items() if matches(pattern, name, field, apart=apart)}
        if not found:
            kinds = Counter(".".join(name.split(".")[-2:]) for name in names)
            there = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
            raise UserError(f"{field}: {pattern!r} matches no parameter of this model; it has: {there}")
        chosen |= found
    return [name for name in dict.fromkeys(names.values()) if name in chosen]


def named(patterns: Sequence[str], names: Sequence[str], field: str, *, every: bool = True) -> list[str]:
    """Those of `names` that any of the patterns matches, in their order; all of them without patterns.

    Raises UserError, naming the `field` of the patterns, if one matches none and `every` one should.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if matches(pattern, name, field)}
        if not found and every:
            kinds = Counter(name.rpartition(".")[2] for name in names)
            there = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
            raise UserError(f"{field}: {pattern!r} matches none of the layers that can be recorded: {there}")
        chosen |= found
    return [name for name in names if name in chosen or not patterns]


def inside(name: str, outer: str) -> bool:
    """Whether the module or parameter `name` is within the module `outer`."""
    return name.startswith(f"{outer}.")


def outside(names: Iterable[str], modules: Collection[str]) -> list[str]:
    """Those of the modules or parameters `names` that are within none of `modules`."""
    return [name for name in names if not any(inside(name, module) for module in modules)]


def parts_in(name: str, apart: Sequence[str]) -> list[str]:
    """Those of the parts `apart` that a dotted name leads through."""
    steps = name.split(".")
    return [part for part in apart if part in steps]
