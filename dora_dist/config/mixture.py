"""Sources of training data that are mixed by weights, as `data.train` lists them."""

from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from dora_dist.config.names import Sources, listed
from dora_dist.config.section import PathText, PathTexts, Section, Text, at_most

Weight = Annotated[float, Field(gt=0), at_most(1e9)]


class MixtureSource(Section):
    """A source, and how often its samples come: in proportion to its weight."""

    path: PathText | PathTexts = Field(description="Files or data sets, as data.train names them")
    weight: Weight = Field(default=1.0, description="Share of the samples, in proportion to those of the other sources")
    name: Text | None = Field(default=None, description="What it is called in the log; null: as its first file is")
    format: Text | None = Field(default=None, description="Its data.format; null: that of all")


Mixture = Annotated[list[MixtureSource], Field(min_length=1)]


def mixture_of(sources: Any) -> list[MixtureSource]:
    """The sources with weights of data.train; none where it lists names alone."""
    return [each for each in sources if isinstance(each, MixtureSource)] if isinstance(sources, list) else []


def formats_of(sources: Any, format: str) -> set[str]:
    """All formats of records, where `format` is that of sources that say none."""
    return {each.format or format for each in mixture_of(sources)} or {format}


def names_of(mixture: Sequence[MixtureSource]) -> list[str]:
    """What each source is called: a name of its own, else that of its first file, numbered where another has it."""
    found: list[str] = []
    given = [each.name for each in mixture if each.name]
    for each in mixture:
        name = each.name or Path(listed(each.path)[0].partition(":")[0]).name.partition(".")[0]
        numbered = (f"{name}-{number}" for number in count(len(found) + 1))
        free = (own for own in chain([name], numbered) if own not in found and (own == each.name or own not in given))
        found.append(next(free))
    return found


def named(sources: Sources) -> list[MixtureSource]:
    """The sources of a mixture, each with the name that it is called by."""
    mixture = mixture_of(sources)
    return [each.model_copy(update={"name": name}) for each, name in zip(mixture, names_of(mixture), strict=True)]


def replaced(sources: Sources, path: Any) -> Any:
    """A mixture with `path` of the names of each source in place of them."""
    return [each.model_copy(update={"path": path(each.path)}) for each in mixture_of(sources)]


def checked(value: Any) -> Any:
    """data.train as it was given, with objects in a list as sources. Raises ValueError that names source and field."""
    if not isinstance(value, list) or not any(isinstance(each, Mapping | MixtureSource) for each in value):
        return value
    found = []
    for number, each in enumerate(value, start=1):
        if isinstance(each, MixtureSource):
            found.append(each)
            continue
        label = f"data.train, source {number}"
        if not isinstance(each, Mapping):
            example = '{"path": "FILE", "weight": 1}'
            raise ValueError(
                f"{label} = {each!r}: some sources have weights, so each must be an object such as {example}"
            )
        if unknown := [name for name in each if name not in MixtureSource.model_fields]:
            known = ", ".join(MixtureSource.model_fields)
            raise ValueError(f'{label}: unknown key "{unknown[0]}"; a source has {known}')
        try:
            found.append(MixtureSource.model_validate({**each}))
        except ValidationError as error:
            finding = error.errors()[0]
            field = MixtureSource.model_fields[str(finding["loc"][0])]
            wanted = "missing" if finding["type"] == "missing" else f"{finding['input']!r}: {finding['msg'].lower()}"
            raise ValueError(f'{label}, "{finding["loc"][0]}": {wanted} ({field.description})') from None
    return found
