"""Reading records from JSON, JSONL, tables, Parquet or a hub data set; errors name the line or the record."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_dist.config.files import not_a_data_file
from dora_dist.config.names import data_set
from dora_dist.data.files import Cells, DataFile, Row, read_rows, shown
from dora_dist.data.formats import FORMATS, Record
from dora_dist.data.repository import data_files, remote_files
from dora_dist.runtime.errors import UserError

_MOST_SHOWN = 8  # fields of a record that a message lists

OnBad = Callable[[UserError], None]
"""What is done about a record that cannot be used."""
TYPE_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


def load_records(sources: Sequence[str | Path], format: str) -> list[Record]:
    """The records of all sources, one after the other, each with the fields that `format` needs.

    Args:
        sources: .json (one list of objects), .jsonl (one object a line, blank lines passed over),
            .parquet, .csv or .tsv (the first line names the columns; a cell for a field that is not text holds JSON or
            a number), all but .parquet also with .gz; or a data set on the hub or in a folder: "name", "name:config",
            "name:config:split" or "name:file".
        format: a name in FORMATS.

    Raises UserError, naming the source and the line or the record (both counted from 1), for a missing or
    empty file, malformed JSON, something that is not a record, a key that a record has twice, and a record that lacks
    a needed field or has something else there.
    """
    return [record for _, record in read_records(sources, FORMATS[format].fields)]


def read_records(
    sources: Sequence[str | Path],
    fields: Mapping[str, type],
    split: str = "train",
    *,
    named_by: Mapping[str, str] | None = None,
    prepare: Callable[[Record], Record] | None = None,
    bad: OnBad | None = None,
) -> Iterator[tuple[str, Record]]:
    """As `load_records`, with each record's place for messages: ("train.jsonl, line 7", {...}).

    split: taken of hub data sets whose name says none. named_by: the fields of the configuration that name `fields`.
    prepare: done to each record before its fields are checked. bad: takes what is wrong with a record, which is then
    left out; it may raise that, as is done without it. What is wrong with a whole file is raised.
    """
    for source in sources:
        row = None
        for row in _read(str(source), split):
            try:
                record = record_of(row, fields, named_by=named_by or {}, prepare=prepare)
            except UserError as error:
                if bad is None:
                    raise
                bad(error)
            else:
                yield row.place, record
        if row is None:
            raise UserError(f"{source} holds no records")


def record_of(
    row: Row,
    fields: Mapping[str, type],
    *,
    named_by: Mapping[str, str],
    prepare: Callable[[Record], Record] | None = None,
) -> Record:
    """A row as `read_records` reads it. Raises UserError, which begins with the row's place."""
    record = row.read()
    if isinstance(record, Cells):
        record = _typed(row.place, record, fields)
    if prepare is not None and isinstance(record, dict):
        try:
            record = prepare(record)
        except UserError as error:
            raise UserError(f"{row.place}: {error}") from error
    _check_fields(row.place, record, fields, named_by)
    found: Record = record
    return found


def _check_fields(place: str, record: Any, fields: Mapping[str, type], named_by: Mapping[str, str]) -> None:
    needed = ", ".join(f'"{name}"' for name in fields)
    if not isinstance(record, dict):
        expected = f"an object with {needed}" if needed else "an object"
        raise UserError(f"{place}: expected {expected}, found {shown(record)}")
    for name, kind in fields.items():
        if name not in record:
            raise UserError(f'{place} has no "{name}"; this format needs {needed}{_instead(name, record, named_by)}')
        value = record[name]
        if value is None:
            raise UserError(f'{place}: "{name}" is null; this format needs {needed}')
        if not isinstance(value, kind):
            raise UserError(f'{place}: "{name}" must be {TYPE_NAMES[kind]}, found {shown(value)}')
        if isinstance(value, str):
            check_characters(f'{place}: "{name}"', value)


def _typed(place: str, row: Cells, fields: Mapping[str, type]) -> Record:
    """A table's row with JSON read where a field is not a text, and a number where it may be one."""
    record: Record = {**row}
    for name in (name for name, kind in fields.items() if kind is not str and name in row):
        try:
            record[name] = json.loads(row[name])
        except (ValueError, RecursionError) as error:
            if fields[name] is not object:
                raise UserError(
                    f'{place}: "{name}" must be {TYPE_NAMES[fields[name]]}, written as JSON, found {shown(row[name])}'
                ) from error
    return record


def _instead(name: str, record: Record, named_by: Mapping[str, str]) -> str:
    """A hint at what a record has instead of a field that it lacks."""
    near = difflib.get_close_matches(name, record, n=1)
    there = ", ".join(f'"{field}"' for field in list(record)[:_MOST_SHOWN]) or "no fields at all"
    if name in named_by:
        field = named_by[name]
        return f"; it has {there}: set {field}" + (f' (did you mean "{near[0]}"?)' if near else "")
    return f' (did you mean to rename "{near[0]}"?)' if near else f"; it has {there}"


def check_characters(label: str, text: str) -> None:
    """Raise UserError, which begins with `label`, for a text that holds half a character, as JSON escapes can."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        before = shown(text[: error.start][-20:])
        raise UserError(
            f"{label} holds half a character ({escape} without its other half, after {before}); write the "
            "whole character, or take it out"
        ) from error


def local_file(source: str) -> Path | None:
    """The file that `source` names, None if it names a data set. Raises UserError for a file that is not there."""
    path = Path(source)
    if data_set(source) is not None:
        return None
    if problem := not_a_data_file(path):
        raise UserError(f"data file {source}: {problem}")
    return path


def files_of(sources: Sequence[str], split: str, *, fetch: bool = True) -> list[DataFile]:
    """All files of some sources, in order. fetch: those of the hub come here first, else they are read from there.

    Raises UserError for what is not there.
    """
    found: list[DataFile] = []
    for source in sources:
        path, data = local_file(source), data_set(source)
        if path is not None:
            found.append(path)
        elif data is not None:
            found += data_files(data, split) if fetch or data.is_here else remote_files(data, split)
    return found


def _read(source: str, split: str) -> Iterator[Row]:
    is_file = data_set(source) is None
    for file in files_of([source], split):
        yield from read_rows(file, source if is_file else str(file), every=True)
