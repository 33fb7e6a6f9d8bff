"""What is compared: methods by name, and variants of them that the command line gives."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import quickstart

from dora_dist.config import RunConfig
from dora_dist.config.fields import field_specs
from dora_dist.runtime.errors import UserError

Fields = dict[str, Any]
"""Fields of a run's configuration by their whole names."""


@dataclass(frozen=True)
class Method:
    """One that is compared: the recipe whose settings it has, and the fields that differ.

    It is `sized` where adapter.r says how many numbers it trains, as many as a LoRA of that r, magnitudes apart. Its
    learning rates are `rate_factor` times those of LoRA's range. `options` are a variant's.
    """

    title: str
    recipe: str = quickstart.CONFIG
    fields: Fields = field(default_factory=dict, hash=False)
    sized: bool = True
    scaled: bool = True
    rate_factor: float = 1.0
    options: tuple[str, ...] = ()

    def at(self, r: int) -> Fields:
        """The fields at a size; lora_alpha is 2·r where the method has one (Liu et al.)."""
        size: Fields = {"adapter.r": r} if self.sized else {}
        alpha = {"adapter.lora_alpha": 2 * r} if self.sized and self.scaled else {}
        return size | alpha | self.fields


METHODS = {
    **{name: Method(method.title, method.recipe, method.fields) for name, method in quickstart.METHODS.items()},
    "dvora": Method("DVoRA", fields={"adapter.method": "vera", "adapter.r": 256}, sized=False, rate_factor=8),
    "mora": Method("MoRA", fields={"adapter.weight_decomposed": False, "adapter.method": "mora"}, scaled=False),
    "full": Method(
        "full fine-tuning",
        fields={"adapter.method": "full", "adapter.target_modules": None, "adapter.r": None},
        sized=False,
        rate_factor=1 / 16,
    ),
}
REFERENCE = "lora"
"""What all others are subtracted from."""


def with_variants(texts: Iterable[str]) -> dict[str, Method]:
    """METHODS and the variants of texts "NAME METHOD --section.field=VALUE ...".

    Raises UserError for one that is not written so, or names an unknown method or field.
    """
    known = set(field_specs(RunConfig))
    methods = dict(METHODS)
    for text in texts:
        name, *rest = shlex.split(text) or [""]
        if len(rest) < 2 or name in methods or rest[0] not in METHODS:
            raise UserError(
                f'--variant "{text}": give a name of its own, one of {", ".join(METHODS)}, and options: '
                '"paper dynamic --adapter.component_init=paper"'
            )
        base, *options = rest
        for option in options:
            option_name, equals, _ = option.removeprefix("--").partition("=")
            if not equals or option_name not in known:
                raise UserError(f'--variant "{text}": {option!r} is not --section.field=VALUE of a configuration')
        methods[name] = replace(METHODS[base], title=name, options=tuple(options))
    return methods
