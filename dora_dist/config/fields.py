"""The schema's fields as data: what each may hold, and how its command-line text becomes a value."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from dora_dist.runtime import strict_json
from dora_dist.runtime.errors import UserError

_WORDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
REQUIRED = object()


@dataclass(frozen=True)
class FieldSpec:
    """One field: its name (`section.key`, or `key` outside of sections), its alternatives as JSON schemas, its default
    or REQUIRED.
    """

    name: str
    kinds: tuple[dict[str, Any], ...]
    default: Any
    description: str

    def expected(self) -> str:
        """What the field may hold, for people: `a whole number >= 1, or null`."""
        return ", or ".join(map(_words, self.kinds))

    def parse(self, text: str) -> Any:
        """The value that command-line `text` stands for, or `text` itself where it stands for none.

        Lists are JSON or comma separated, objects are JSON, null is None where the field may be null. Raises UserError
        for JSON that `strict_json` refuses.
        """
        types = {kind.get("type") for kind in self.kinds}
        if "null" in types and text == "null":
            return None
        if "array" in types and "string" not in types and not text.startswith("["):
            return [part.strip() for part in text.split(",")] if text else []
        if "array" in types and "," in text and not text.startswith(("[", "{")):
            return [part.strip() for part in text.split(",")]
        if types & {"integer", "number", "boolean"} or ("object" in types and "string" not in types):
            return _json_or_text(self.name, text)
        if ("array" in types and text.startswith("[")) or ("object" in types and text.startswith("{")):
            return _json_or_text(self.name, text)
        return text

    def help(self) -> str:
        """The meaning, the range and the default, for `--help`."""
        default = "required" if self.default is REQUIRED else f"default: {json.dumps(self.default)}"
        return f"{self.description} ({'; '.join([*filter(None, map(_range, self.kinds)), default])})"


@cache  # every command asks several times, and the schema is made by pydantic each time
def field_specs(schema: type[BaseModel]) -> dict[str, FieldSpec]:
    """Every field by its name, in order: those of the sections as `section.key`, others as they are called."""
    document = schema.model_json_schema()
    inside = sections(schema)
    entries: dict[str, dict[str, Any]] = {}
    for name, entry in document["properties"].items():
        if name in inside:
            properties = document["$defs"][inside[name].__name__]["properties"]
            entries |= {f"{name}.{key}": field for key, field in properties.items()}
        else:
            entries[name] = entry
    return {
        name: FieldSpec(
            name, tuple(entry.get("anyOf", [entry])), entry.get("default", REQUIRED), entry.get("description", "")
        )
        for name, entry in entries.items()
    }


def sections(schema: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections of a schema by name, in order."""
    kinds = {name: field.annotation for name, field in schema.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def values(document: Mapping[str, Any], schema: type[BaseModel]) -> dict[str, Any]:
    """The values in a configuration's JSON by the names of fields; fields that it does not have are left out."""
    found = {}
    for name in field_specs(schema):
        section, _, key = name.rpartition(".")
        holder = document.get(section, {}) if section else document
        if key in holder:
            found[name] = holder[key]
    return found


def _words(kind: dict[str, Any]) -> str:
    if "anyOf" in kind:
        return " or ".join(map(_words, kind["anyOf"]))
    if "const" in kind:
        return json.dumps(kind["const"])
    if "enum" in kind:
        return "one of " + ", ".join(json.dumps(value) for value in kind["enum"])
    if kind.get("type") == "array":
        return "a list of objects" if "$ref" in kind.get("items", {}) else "a list of text"
    if kind.get("type") == "object":
        values = kind.get("additionalProperties")
        return f"a JSON object, each value {_words(values)}" if isinstance(values, dict) else "a JSON object"
    if kind.get("type") == "string":
        return "text" + (" (not empty)" if kind.get("minLength") else "")
    return f"{_WORDS[kind['type']]} {_range(kind)}".strip()


def _range(kind: dict[str, Any]) -> str:
    return " and ".join(f"{sign} {kind[key]}" for key, sign in _LIMITS.items() if key in kind)


def _json_or_text(name: str, text: str) -> Any:
    try:
        return strict_json.parse(text)
    except json.JSONDecodeError:
        return text
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
