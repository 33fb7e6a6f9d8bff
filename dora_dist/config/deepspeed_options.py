"""Checks the user's own engine options. DeepSpeed ignores keys that it does not know; here they are errors.

DeepSpeed's code is the only list of its keys, so its parser is given a dict that records which keys are looked up.
"""

from __future__ import annotations

import difflib
from collections.abc import ItemsView, Iterator, KeysView
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dora_dist.config.engine import merged
from dora_dist.runtime.errors import UserError

_ANY_BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 3}}
_DEFAULTS = {"steps_per_print": 10}  # a value of the right kind, where DeepSpeed's default is None
_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("text", (str,)),
    dict: ("a JSON object", (dict,)),
}


def check(options: dict[str, Any]) -> None:
    """Raise UserError for keys that DeepSpeed does not know, at any level, and for values that it cannot take.

    Imports deepspeed, which chooses its accelerator then: set DS_ACCELERATOR before.
    """
    if lines := [*_zero_problems(options), *_other_problems(options)]:
        raise UserError("engine.deepspeed: DeepSpeed refuses it\n  " + "\n  ".join(lines))


def _zero_problems(options: dict[str, Any]) -> Iterator[str]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**merged({"stage": 3}, options.get("zero_optimization", {})))
    except ValidationError as error:
        yield from _explained(error, "zero_optimization", dict(_fields(DeepSpeedZeroConfig)))


def _other_problems(options: dict[str, Any]) -> Iterator[str]:
    """What is wrong outside of zero_optimization."""
    others = {key: value for key, value in options.items() if key != "zero_optimization"}
    asked = _Asked(merged(_ANY_BATCH, others))
    refusal = _refusal(asked)
    if wrong := [*asked.wrong_kinds(), *_unknown_dtypes(others)]:
        yield from wrong
    elif refusal is None:
        yield from asked.unknown()
    else:
        refusals = ((key, _refusal(_alone(key, value))) for key, value in others.items())
        yield from next((_told(key, others[key], found) for key, found in refusals if found), [str(refusal)])


def _told(key: str, value: Any, refusal: Exception) -> Iterator[str]:
    """DeepSpeed's refusal of the top-level `key`, in words that name it."""
    if isinstance(refusal, ValidationError):
        yield from _explained(refusal, key, {})
    elif not isinstance(value, dict) and _refusal(_alone(key, {})) is None:
        yield f"{key} = {value!r}: must be a JSON object"
    else:
        yield f"{key} = {value!r}: {refusal}"


def _alone(key: str, value: Any) -> _Asked:
    return _Asked(merged(_ANY_BATCH, {key: value}))


def _refusal(options: _Asked) -> Exception | None:
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(options)
    except Exception as error:  # it asserts, and raises errors of many kinds
        return error
    return None


def _unknown_dtypes(options: dict[str, Any]) -> Iterator[str]:
    """Names of number formats that DeepSpeed looks up only once its engine is built."""
    from deepspeed.runtime.config import DtypeEnum

    for key in ("grad_accum_dtype", "buffer_dtype"):
        name = options.get("data_types", {}).get(key)
        if name is not None and name not in [word for kind in DtypeEnum for word in kind._all_values]:
            yield f'data_types.{key} = {name!r}: must be "fp32", "bf16" or "fp16"'


def _explained(error: ValidationError, section: str, known: dict[str, list[str]]) -> Iterator[str]:
    """A line per finding; `known` keys by the dotted name of what has them."""
    for finding in error.errors(include_url=False):
        path = [str(part) for part in finding["loc"]]
        name = ".".join(path if path[:1] == [section] else [section, *path])
        if finding["type"] != "extra_forbidden":
            yield f"{name} = {finding['input']!r}: {finding['msg']}"
            continue
        outer = ".".join(path[:-1])
        close = difflib.get_close_matches(path[-1], known.get(outer, []), 1)
        yield f"{name}: unknown key{f'; did you mean {close[0]}?' if close else '; leave it out'}"


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """The keys of a pydantic model and of the models inside it, with their aliases, by dotted name."""
    yield prefix, [name for key, field in model.model_fields.items() for name in (key, field.alias) if name]
    for key, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _fields(kind, f"{prefix}.{key}".lstrip("."))


class _Asked(dict[str, Any]):
    """A dict, and the ones in it, that know which keys were looked up, and with which default."""

    def __init__(self, content: dict[str, Any], name: str = "") -> None:
        self.name = name
        self.asked: dict[str, Any] = {}
        self.taken_whole = False
        inner = {k: _Asked(v, f"{name}{k}.") if isinstance(v, dict) else v for k, v in content.items()}
        super().__init__(inner)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked[key] = default
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.taken_whole = True
        return super().__iter__()

    def keys(self) -> Any:
        return KeysView(self)  # `key in options.keys()` is a look-up, too

    def items(self) -> Any:
        return ItemsView(self)

    def __copy__(self) -> _Asked:
        return self

    def unknown(self) -> Iterator[str]:
        """Keys that were not looked up, though others of their section were."""
        for key, value in dict.items(self):
            if self.asked and not self.taken_whole and key not in self.asked:
                close = difflib.get_close_matches(key, self.asked, 1)
                hint = f"did you mean {self.name}{close[0]}?" if close else "DeepSpeed would ignore it; leave it out"
                yield f"{self.name}{key}: unknown key; {hint}"
            elif isinstance(value, _Asked):
                yield from value.unknown()

    def wrong_kinds(self) -> Iterator[str]:
        """Values of another kind than DeepSpeed's default, which DeepSpeed itself does not check."""
        for key, value in dict.items(self):
            if isinstance(value, _Asked):
                yield from value.wrong_kinds()
            default = self.asked.get(key)
            words, kinds = _KINDS.get(type(_DEFAULTS.get(key) if default is None else default), ("", ()))
            fits = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
            if kinds and value is not None and not fits:
                yield f"{self.name}{key} = {value!r}: must be {words}"
