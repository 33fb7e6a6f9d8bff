"""Which modules of a model become DoraLinear."""

import re
from collections import Counter
from collections.abc import Sequence

from torch import nn

from dora_dist.adapters.linear import AdapterSpec, DoraLinear
from dora_dist.errors import UserError

_LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
FAMILY_TARGETS: dict[str, list[str]] = {
    name: _LLAMA_LIKE for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "granite", "smollm3")
}
"""Default `target_modules` by a Hugging Face config's `model_type`: the paper's choice (section 5.1)."""


def inject(
    model: nn.Module, spec: AdapterSpec, target_modules: Sequence[str] | None, magnitude_only: Sequence[str] = ()
) -> list[str]:
    """Replace every nn.Linear that a pattern names by a DoraLinear over the SAME parameters, in place.

    A pattern is a module's full name, a suffix of it that starts at a dot ("q_proj", "mlp.up_proj"), or a regular
    expression that matches the full name. None means the model family's default. `magnitude_only` modules get a
    magnitude and no low-rank factors. All other parameters are frozen. Returns the names of the adapted modules.

    Raises UserError if a pattern matches nothing, if both lists match one module, or if a weight is shared with
    another module (adapting a tied weight in one place would silently change or not change the other).
    """
    model.requires_grad_(False)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    patterns = list(target_modules) if target_modules is not None else _family_targets(model)
    low_rank = _match_all(patterns, linears, "adapter.target_modules")
    magnitudes = _match_all(magnitude_only, linears, "adapter.magnitude_only_modules")
    if both := sorted(low_rank & magnitudes):
        raise UserError(
            f"adapter.magnitude_only_modules and adapter.target_modules both match {both[0]!r}; "
            "take it out of one of the two"
        )
    _refuse_shared(model, {name: linears[name] for name in low_rank | magnitudes})

    magnitude_spec = AdapterSpec(r=None, weight_decomposed=True)
    adapted = [name for name in linears if name in low_rank or name in magnitudes]
    for name in adapted:
        parent, _, child = name.rpartition(".")
        linear = linears[name]
        layer = DoraLinear(linear.weight, linear.bias, spec if name in low_rank else magnitude_spec)
        setattr(model.get_submodule(parent), child, layer)
    return adapted


def _family_targets(model: nn.Module) -> list[str]:
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FAMILY_TARGETS:
        raise UserError(
            f"adapter.target_modules is not set and the model family {family!r} has no default; "
            f"name the modules to adapt (families with a default: {', '.join(FAMILY_TARGETS)})"
        )
    return FAMILY_TARGETS[family]


def _match_all(patterns: Sequence[str], linears: dict[str, nn.Linear], field: str) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        names = {name for name in linears if _matches(pattern, name, field)}
        if not names:
            kinds = Counter(name.rpartition(".")[2] for name in linears)
            could = ", ".join(f"{kind} ({count})" for kind, count in kinds.items()) or "none"
            raise UserError(f"{field}: {pattern!r} matches no linear layer of this model; it has: {could}")
        matched |= names
    return matched


def _matches(pattern: str, name: str, field: str) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is neither a module name nor a regular expression ({error})") from error


def _refuse_shared(model: nn.Module, targets: dict[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, linear in targets.items():
        shared = owners[id(linear.weight)]
        if len(shared) > 1:
            raise UserError(
                f"adapter.target_modules: {name!r} shares its weight with {', '.join(n for n in shared if n != name + '.weight')}; "
                "a tied weight cannot be adapted in one place only: leave it out of target_modules"
            )
