"""What the patterns of a configuration name: modules and parameters of a model."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from torch import nn

from dora_dist.runtime.errors import UserError

ParameterPlan = Callable[[nn.Module], list[str]]
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


def matching(
    patterns: Sequence[str],
    names: Collection[str],
    field: str,
    *,
    apart: Sequence[str] = (),
    otherwise: Callable[[str], str] | None,
) -> set[str]:
    """Those of `names` that any pattern matches.

    Raises UserError for a pattern that matches none: `otherwise` says of it what it does, and what there is; with None
    it may.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if matches(pattern, name, field, apart=apart)}
        if not found and otherwise is not None:
            raise UserError(f"{field}: {pattern!r} {otherwise(pattern)}")
        chosen |= found
    return chosen


def kinds_of(names: Iterable[str], steps: int = 1) -> str:
    """The last `steps` of dotted names with how often they occur, for messages: "q_proj (2), v_proj (2)"."""
    kinds = Counter(".".join(name.split(".")[-steps:]) for name in names)
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common()) or "none"


def trained_in_full(
    model: nn.Module,
    patterns: Sequence[str],
    field: str = "adapter.trained_modules",
    *,
    apart: Sequence[str] = (),
) -> list[str]:
    """The outermost modules with parameters that a pattern names, in the model's order.

    Raises UserError, naming the `field` of the patterns, if one matches none.
    """
    modules = [name for name, m in model.named_modules() if name and next(m.parameters(), None) is not None]
    outer = ", ".join(name for name in modules if "." not in name)
    none = f"matches no module with parameters; the outermost are: {outer}"
    matched = matching(patterns, modules, field, apart=apart, otherwise=lambda pattern: none)
    return outside((name for name in modules if name in matched), matched)


def parameters_matching(
    model: nn.Module, patterns: Sequence[str], field: str = "adapter.trained_parameters", *, apart: Sequence[str] = ()
) -> list[str]:
    """The parameters that a pattern names, in the model's order, each once however many names.

    Raises UserError, naming the `field` of the patterns, if one matches none.
    """
    names = {name: every[0] for every in names_of_each(model) for name in every}
    none = f"matches no parameter of this model; it has: {kinds_of(names, steps=2)}"
    chosen = {names[name] for name in matching(patterns, names, field, apart=apart, otherwise=lambda pattern: none)}
    return [name for name, _ in model.named_parameters() if name in chosen]


def names_of_each(model: nn.Module) -> list[list[str]]:
    """All names of each parameter; several where modules share it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


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
