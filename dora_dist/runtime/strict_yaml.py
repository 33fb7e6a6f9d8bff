"""YAML that means what the same words in JSON would: `strict_json` with YAML's spelling.

PyYAML reads YAML 1.1, in which `1e-4` is a text, `no` is false and `2026-01-31` a date. Here a plain word is a number,
true, false or null where it is one in JSON, and a text otherwise. Of YAML 1.2's core schema `True`, `TRUE`, `Null`, `~`
and nothing at all are read, too; its other numbers (`+1`, `.5`, `0x10`, `.nan`) are texts.
"""

import re
from typing import Any, ClassVar

import yaml

from dora_dist.runtime import strict_json

_MOST_VALUES = 100_000
"""Of one file: anchors can repeat a section in a section, which makes a short file large without end."""
_MERGE = "tag:yaml.org,2002:merge"


class NotYaml(ValueError):
    """What is wrong, and where: `line 3, column 5: ...`."""


def parse(text: str) -> Any:
    """The value in YAML `text`. Raises NotYaml; also for repeated keys, keys that are not text, and several documents.

    Tags (`!!python/...` and all others but those of JSON's values) are refused, anchors and merge keys (`<<`) are read.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise NotYaml(f"{place}{error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:  # a character that YAML does not have; brackets without end
        said = "brackets are nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise NotYaml(said) from None
    return strict_json.bounded(value, _MOST_VALUES)


class _Loader(yaml.SafeLoader):
    """Resolves plain words as JSON does."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


def _error(problem: str, node: Any) -> Exception:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _mapping(loader: Any, node: Any) -> dict[str, Any]:
    seen: set[str] = set()
    for key in [key for key, _ in node.value if key.tag != _MERGE]:
        if key.tag != "tag:yaml.org,2002:str":
            raise _error("a key that is not text; quote it", key)
        if key.value in seen:
            raise _error(f'the key "{key.value}" is given twice in one section; keep one', key)
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


def _unknown(loader: Any, node: Any) -> Any:
    raise _error(f"the tag {node.tag} has no meaning here", node)


def _number(read: Any) -> Any:
    def construct(loader: Any, node: Any) -> Any:
        try:
            return read(node.value)
        except ValueError as error:
            raise _error(str(error), node) from None

    return construct


_NUMBER = r"-?(0|[1-9][0-9]*)"
for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _NUMBER, list("-0123456789")),
    ("float", rf"{_NUMBER}(\.[0-9]+)?([eE][-+]?[0-9]+)?", list("-0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.yaml_constructors = {None: _unknown}
for _tag, _construct in (
    ("null", lambda loader, node: None),
    ("bool", lambda loader, node: node.value.lower() == "true"),
    ("int", _number(strict_json.whole)),
    ("float", _number(strict_json.finite)),
    ("str", lambda loader, node: node.value),
    ("seq", lambda loader, node: loader.construct_sequence(node, deep=True)),
    ("map", _mapping),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)
