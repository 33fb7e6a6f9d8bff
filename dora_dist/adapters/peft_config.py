"""adapter_config.json of a PEFT folder: which of its fields can be read, and which modules it says are adapted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora_dist.adapters.projection import KEYS
from dora_dist.config.names import PEFT_ADAPTER
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import read_json_object

CONFIG_NAME = PEFT_ADAPTER
NO_TARGETS = "dummy-target-modules"  # what PEFT takes for an adapter of trained modules alone
REMEDY = "save the adapter again"
# Fields that are read here, or that change neither the function of the saved adapter nor its base. Any other field,
# of today's PEFT or tomorrow's, must be empty: what is not understood is refused, not ignored.
_UNDERSTOOD = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
}
_UNDERSTOOD_OF: dict[str, set[str]] = {
    "LORA": {
        "alpha_pattern",
        "corda_config",
        "eva_config",
        "init_lora_weights",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "rank_pattern",
        "runtime_config",
        "use_dora",
        "use_rslora",
    },
    "VERA": {"d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"},
}
# The other initialisations (pissa, olora, loftq, ...) also change the base weight that the adapter sits on.
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
_TEXT, _FLAG, _LIST = "text", "true or false", "a list of module names"
_KINDS: dict[str, tuple[str, ...]] = {  # null is right everywhere
    "base_model_name_or_path": (_TEXT,),
    "revision": (_TEXT,),
    "task_type": (_TEXT,),
    "save_projection": (_FLAG,),
    "use_dora": (_FLAG,),
    "use_rslora": (_FLAG,),
    "target_modules": (_TEXT, _LIST),
    "exclude_modules": (_TEXT, _LIST),
    "modules_to_save": (_LIST,),
}
_MOST = 1e30  # what scales fp32 numbers has to be one


def read_peft_config(path: Path) -> dict[str, Any]:
    """The checked adapter_config.json. Raises UserError, naming file and field, for what cannot be expressed here."""
    if not path.is_file():
        raise UserError(f"{path.parent}: not a PEFT adapter folder, it has no {path.name}")
    config = read_json_object(path, REMEDY)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _UNDERSTOOD_OF:
        raise UserError(f"{path}: peft_type={kind!r} is not supported; LORA, its DoRA, and VERA are")
    for name, value in config.items():
        if name not in _UNDERSTOOD | _UNDERSTOOD_OF[kind] and value not in (None, False, "none", [], {}):
            raise UserError(f"{path}: {name}={value!r} is not supported; train the adapter without it")
        if value is not None and name in _KINDS and not any(_is(kind, value) for kind in _KINDS[name]):
            raise UserError(f"{path}: {name}={value!r} must be {' or '.join(_KINDS[name])}; correct it")
    bias = config.get("bias") or "none"
    if bias not in ("none", "all") and not str(bias).endswith("_only"):
        raise UserError(f"{path}: bias={bias!r} is not supported; none, all and those of adapted layers are")
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            _check_expression(path, name, config[name])
    _check_number(path, "r", config.get("r"), whole=True)
    for name in ("lora_dropout", "vera_dropout"):
        dropout = config.get(name) or 0.0
        if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise UserError(f"{path}: {name}={dropout!r} must be a number from 0 to 1; correct it")
    _CHECKS[kind](path, config)
    return config


def _check_lora(path: Path, config: dict[str, Any]) -> None:
    init = config.get("init_lora_weights")
    if init not in _INITS_THAT_KEEP_THE_BASE:
        remedy = "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        raise UserError(f"{path}: init_lora_weights={init!r} changes the base weights; {remedy}")
    _check_number(path, "lora_alpha", config.get("lora_alpha"), whole=False)
    for name, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        if not isinstance(config.get(patterns) or {}, dict):
            raise UserError(f"{path}: {patterns} must map module names to numbers; correct it")
        for pattern, value in (config.get(patterns) or {}).items():
            _check_number(path, f"{patterns}[{pattern!r}]", value, whole=name == "r")
            _check_expression(path, patterns, pattern)


def _check_vera(path: Path, config: dict[str, Any]) -> None:
    key = config.get("projection_prng_key")
    if type(key) is not int or key not in KEYS:
        raise UserError(
            f"{path}: projection_prng_key={key!r} must be a whole number: what PEFT draws the matrices from that all "
            "layers share; correct it"
        )


_CHECKS = {"LORA": _check_lora, "VERA": _check_vera}


def peft_type(path: Path) -> str:
    """Which kind of PEFT adapter an adapter_config.json says it is of; "LORA" where it says none that is known."""
    kind = read_json_object(path, REMEDY).get("peft_type") if path.is_file() else None
    return kind if isinstance(kind, str) and kind in _CHECKS else "LORA"


def targets(config: dict[str, Any]) -> Callable[[str], bool]:
    """Whether PEFT adapts a module, by its name in the base, as target_modules and exclude_modules have it.

    True for every name where the two do not say it: target_modules null or "all-linear".
    """
    targeted, excluded = config.get("target_modules"), config.get("exclude_modules")
    if targeted in (None, "all-linear"):
        return lambda name: True
    return lambda name: _named(name, targeted) and not _named(name, excluded)


def pattern_value(config: dict[str, Any], patterns: str, default: str, module: str) -> Any:
    """PEFT's lookup: the first pattern that matches the end of the module's name wins."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config[default]


def _named(name: str, patterns: str | list[str] | None) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns or [])


def _is(kind: str, value: object) -> bool:
    if kind == _LIST:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    return isinstance(value, str if kind == _TEXT else bool)


def _check_expression(path: Path, name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{path}: {name} has the bad pattern {pattern!r}: {error}") from error


def _check_number(path: Path, name: str, value: object, whole: bool) -> None:
    fits = not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < _MOST
    if not fits or (whole and not isinstance(value, int)):
        raise UserError(f"{path}: {name}={value!r} must be a positive number; correct it")
