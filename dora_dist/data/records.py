"""Reading records from JSON, JSONL, Parquet or a hub data set; whatever is wrong is named to the line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dora_dist.config.names import DATA_SUFFIXES as SUFFIXES
from dora_dist.config.names import data_set
from dora_dist.data.repository import data_files
from dora_dist.errors import UserError

Record = dict[str, Any]

# For each format, the fields a record must have and the type of each.
FIELDS: dict[str, dict[str, type]] = {
    "instruction": {"instruction": str, "output": str},
    "alpaca": {"instruction": str, "output": str},
    "completion": {"prompt": str, "completion": str},
    "messages": {"messages": list},
}
TYPE_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


def load_records(sources: Sequence[str | Path], format: str) -> list[Record]:
    """The records of all sources, one after the other, each with the fields that `format` needs.

    Args:
        sources: .json (one list of objects), .jsonl (one object a line, blank lines passed over),
            .parquet, or a data set on the hub or in a folder: "name", "name:config", "name:config:split" or
            "name:file".
        format: a name in FIELDS.

    Raises UserError, naming the source and the line or the record (both counted from 1), for a missing or
    empty file, malformed JSON, something that is not a record, or a record that lacks a needed field.
    """
    return [record for _, record in read_records(sources, FIELDS[format])]


def read_records(
    sources: Sequence[str | Path], fields: Mapping[str, type], split: str = "train"
) -> Iterator[tuple[str, Record]]:
    """As `load_records`, with each record's place for messages: ("train.jsonl, line 7", {...}).

    `split` is taken of hub data sets whose name says none.
    """
    for source in sources:
        count = 0
        for place, record in _read(str(source), split):
            _check_fields(place, record, fields)
            yield place, record
            count += 1
        if count == 0:
            raise UserError(f"{source} holds no records")


def _check_fields(place: str, record: Any, fields: Mapping[str, type]) -> None:
    needed = ", ".join(f'"{name}"' for name in fields)
    if not isinstance(record, dict):
        expected = f"an object with {needed}" if needed else "an object"
        raise UserError(f"{place}: expected {expected}, found {_shown(record)}")
    for name, kind in fields.items():
        if record.get(name) is None:
            near = difflib.get_close_matches(name, record, n=1)
            hint = f' (did you mean to rename "{near[0]}"?)' if near else ""
            raise UserError(f'{place} has no "{name}"; this format needs {needed}{hint}')
        if not isinstance(record[name], kind):
            raise UserError(f'{place}: "{name}" must be {TYPE_NAMES[kind]}, found {_shown(record[name])}')


def local_file(source: str) -> Path | None:
    """The file that `source` names, None if it names a data set. Raises UserError for a file that is not there."""
    path = Path(source)
    if data_set(source) is not None:
        return None
    if not path.exists():
        raise UserError(f"data file {source} does not exist{_near(path)}")
    return path


def _read(source: str, split: str) -> Iterator[tuple[str, Any]]:
    path, data = local_file(source), data_set(source)
    if path is None:
        assert data is not None
        return chain.from_iterable(_read(str(file), split) for file in data_files(data, split))
    if path.suffix == ".jsonl":
        return _read_lines(path)
    if path.suffix == ".json":
        return _numbered(source, _read_json(path))
    if path.suffix == ".parquet":
        return _numbered(source, _parquet_rows(path))
    raise UserError(f"{source}: unknown kind of data file; give {', '.join(SUFFIXES)}")


def _numbered(source: str, rows: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{source}, record {number}", row) for number, row in enumerate(rows, start=1))


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
                raise UserError(f"{place} is not JSON: {error}") from error


def _read_json(path: Path) -> list[Any]:
    text = path.read_bytes()
    if not text.strip():
        raise UserError(f"{path} is empty")
    try:
        rows = json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        one_a_line = error.msg == "Extra data" and error.lineno > 1
        hint = "; one record a line belongs in a file named .jsonl" if one_a_line else ""
        raise UserError(f"{path}, line {error.lineno} is not JSON: {error}{hint}") from error
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} is not UTF-8 text: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected one list of records, found {_shown(rows)}")
    return rows


def _parquet_rows(path: Path) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _near(path: Path) -> str:
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, neighbours, n=1)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
