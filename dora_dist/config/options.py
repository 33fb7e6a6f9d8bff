"""Dotted command-line options, generated from the schema: `--training.max_steps 10 --adapter.r=8`."""

import argparse
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from dora_dist.config.fields import field_specs, sections
from dora_dist.config.problems import suggestion
from dora_dist.config.source import Source
from dora_dist.runtime.errors import UserError

_METAVARS = {"integer": "INT", "number": "NUM", "boolean": "true|false", "array": "LIST", "object": "JSON"}


def apply(source: Source, arguments: Sequence[str], schema: type[BaseModel]) -> None:
    """Write the values of dotted `arguments` over those of config files; later ones win. Raises UserError."""
    specs = field_specs(schema)
    tokens = iter(arguments)
    for token in tokens:
        option, equals, text = token.partition("=")
        name = option.removeprefix("--")
        if not option.startswith("--"):
            raise UserError(f"{token}: not an option; write --section.field VALUE, such as --adapter.r 16")
        if name not in specs:
            raise UserError(f"{option}: unknown option{suggestion(name, specs)}")
        if not equals:
            text = next(tokens, "--")
            if text.startswith("--"):
                raise UserError(f"{option}: needs a value, {specs[name].expected()}")
        section, _, key = name.rpartition(".")
        values = source.raw.setdefault(section, {}) if section else source.raw
        if not isinstance(values, dict):
            return  # the schema says what is wrong with such a section, better than we could here
        values[key] = specs[name].parse(text)
        source.forget(tuple(name.split(".")))


def add_arguments(parser: argparse.ArgumentParser, schema: type[BaseModel]) -> None:
    """One option per field, grouped by section. Parsing collects `overrides` for `RunConfig.load`."""
    parser.set_defaults(overrides=[])
    groups = {
        name: parser.add_argument_group(name, description=section.__doc__) for name, section in sections(schema).items()
    }
    for name, spec in field_specs(schema).items():
        groups.get(name.rpartition(".")[0], parser).add_argument(
            f"--{name}",
            action=_Collect,
            dest="overrides",
            metavar=_metavar(spec.kinds),
            help=spec.help().replace("%", "%%"),
        )


def _metavar(kinds: Sequence[dict[str, Any]]) -> str:
    """The first alternative, and the single words that may stand in its place: `true|false|selective`."""
    first, *others = sorted(kinds, key=lambda kind: "const" in kind)
    words = first["enum"] if "enum" in first else [_METAVARS.get(first["type"], "TEXT")]
    return "|".join([*words, *(kind["const"] for kind in others if "const" in kind)])


def check_names(arguments: Sequence[str], schema: type[BaseModel]) -> None:
    """Raise UserError for an unknown dotted option: argparse would not say what was meant."""
    specs = field_specs(schema)
    for token in arguments:
        name = token.partition("=")[0].removeprefix("--")
        if token.startswith("--") and "." in name and name not in specs:
            raise UserError(f"--{name}: unknown option{suggestion(name, specs)}")


class _Collect(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.overrides = [*namespace.overrides, f"{option_string}={values}"]
