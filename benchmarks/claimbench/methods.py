"""What is compared: methods by name, and variants of them that the command line gives."""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dora_dist.config import RunConfig
from dora_dist.config.fields import field_specs
from dora_dist.runtime.errors import UserError

Fields = dict[str, Any]
"""Fields of a run's configuration by their whole names."""
RECIPE, DYNAMIC_RECIPE = "configs/quickstart.json", "configs/quickstart_dynamic.json"


@dataclass(frozen=True)
class Method:
    """One that is compared: the recipe whose settings it has, and the fields that differ.

    It is `sized` where adapter.r says how many numbers it trains, as many as a LoRA of that r, magnitudes apart. Its
    learning rates are `rate_factor` times those of LoRA's range. `options` are a variant's.
    """

    title: str
    recipe: str = RECIPE
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


_PLAIN: Fields = {"adapter.weight_decomposed": False}
METHODS = {
    "lora": Method("LoRA", fields=_PLAIN),
    "dora": Method("DoRA"),
    "dynamic": Method("dynamic rank", DYNAMIC_RECIPE, _PLAIN),
    "union": Method("DoRA, dynamic rank", DYNAMIC_RECIPE),
    "dvora": Method("DVoRA", fields={"adapter.method": "vera", "adapter.r": 256}, sized=False, rate_factor=8),
    "mora": Method("MoRA", fields={**_PLAIN, "adapter.method": "mora"}, scaled=False),
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
                '"from-lora dynamic --adapter.component_init=lora"'
            )
        base, *options = rest
        for option in options:
            option_name, equals, _ = option.removeprefix("--").partition("=")
            if not equals or option_name not in known:
                raise UserError(f'--variant "{text}": {option!r} is not --section.field=VALUE of a configuration')
        methods[name] = replace(METHODS[base], title=name, options=tuple(options))
    return methods


def as_options(fields: Mapping[str, Any]) -> list[str]:
    """--section.field=VALUE as `dora-dist train` takes them."""
    return [f"--{name}={v if isinstance(v, str) else json.dumps(v, default=str)}" for name, v in fields.items()]
