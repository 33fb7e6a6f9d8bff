"""Files to rows: JSON, JSONL, tables of texts and Parquet, with the place of every row and of what is wrong with it."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from dora_dist.config.names import GZIP, TABLES
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.hub import RemoteFile

_KINDS = (
    (b"\x1f\x8b", "a gzip archive: name it .gz behind the ending that it has unpacked"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive: unpack it first"),
    (b"PAR1", "a Parquet file: name it .parquet"),
    (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data: fetch it with `git lfs pull`"),
    (b"<!doctype html", "a web page, not the data: download the file itself"),
    (b"<html", "a web page, not the data: download the file itself"),
)
"""How files begin that are named as data and hold something else, and what to do about it."""
_BATCH = 1000  # rows of a Parquet file that are decoded at once
_HEAD = 4096  # bytes that are searched for these
_LONGEST_CELL = 1 << 27  # characters; a quote that is never closed would else take a whole table into memory


DataFile = Path | RemoteFile
"""A file here, or one of the hub that is read from there."""


class Row(NamedTuple):
    """A row of a file: its place for messages, and what reads it.

    `read` raises UserError, which begins with the place, for a row that cannot be read; the rows after it can be.
    """

    place: str
    read: Callable[[], Any]


def read_rows(path: DataFile, source: str, *, every: bool = False) -> Iterator[Row]:
    """Each row of a file (`config.names.DATA_SUFFIXES`); `source` is the file's name in the places of its rows.

    every: whether all of them will be read, which may then be done for many at once.
    Raises UserError for a file that cannot be read as what its name says.
    """
    kind = _kind(path)
    try:
        if kind == ".jsonl":
            yield from _lines(path)
        elif kind in TABLES:
            yield from _table(path, "," if kind == ".csv" else "\t")
        elif kind == ".parquet":
            yield from _parquet(path, source, at_once=every)
        else:
            for number, row in enumerate(_listed(path), start=1):
                yield Row(f"{source}, record {number}", partial(_given, row))
    except gzip.BadGzipFile as error:
        raise UserError(
            f"{source} is not a gzip archive, or a damaged one ({error}); pack it again, or rename it"
        ) from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{source} ends too soon or is damaged ({error}); copy or download it again") from error
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}") from error


def shown(value: Any) -> str:
    """A value as JSON, shortened, for messages."""
    text = json.dumps(value, default=str, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _given(value: Any) -> Any:
    """What is known of a row already; raised, where that is an error."""
    if isinstance(value, UserError):
        raise value
    return value


def _lines(path: DataFile) -> Iterator[Row]:
    _check_kind(path)
    first = True
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Row(f"{path}, line {number}", partial(_line, line, path, number, first=first))
                first = False


def _line(line: bytes, path: DataFile, number: int, *, first: bool) -> Any:
    place = f"{path}, line {number}"
    value, repeated = _decoded(line.rstrip(b"\r\n"), path, number, first)
    if repeated:
        raise UserError(f'{place}: the key "{repeated[0][1]}" is there twice; keep one')
    if first and isinstance(value, list):
        raise UserError(f"{place}: expected an object, found a list; a list of records belongs in a .json file")
    return value


def _listed(path: DataFile) -> list[Any]:
    _check_kind(path)
    with _opened(path) as file:
        text = file.read()
    if not text.strip():
        raise UserError(f"{path} is empty")
    rows, repeated = _decoded(text, path)
    if isinstance(rows, dict):
        inside = [name for name, value in rows.items() if isinstance(value, list)]
        hint = f'; if they are in "{inside[0]}", save that list alone' if inside else "; put records between [ and ]"
        raise UserError(f"{path}: expected one list of records, found an object{hint}")
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected one list of records, found {shown(rows)}")
    if not repeated:
        return rows
    twice = {id(value): key for value, key in repeated}
    keys = [_held(row, twice) for row in rows]
    return [
        row if key is None else UserError(f'{path}, record {number}: the key "{key}" is there twice; keep one')
        for number, (row, key) in enumerate(zip(rows, keys, strict=True), start=1)
    ]


def _decoded(
    text: bytes, path: DataFile, number: int | None = None, first: bool = False
) -> tuple[Any, list[tuple[dict[str, Any], str]]]:
    """What JSON says, and its objects that have a key twice, with the key.

    number: of the only line that `text` is; None: it is a whole file. first: nothing precedes that line.
    """
    repeated = []

    def place(line: int | None = None) -> str:
        known = number or line
        return f"{path}, line {known}" if known else str(path)

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated.append((found, next(key for key in keys if keys.count(key) > 1)))
        return found

    text = text.removeprefix(b"\xef\xbb\xbf")
    try:
        return json.loads(text.decode(), object_pairs_hook=collect), repeated
    except UnicodeDecodeError as error:
        raise UserError(_not_utf_8(place(text.count(b"\n", 0, error.start) + 1), text, error)) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place(error.lineno)} is not JSON: {error.msg}, at column {error.colno}{_hint(path, error, first)}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{place()} is no record: its JSON is nested too deeply") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise UserError(f"{place()} holds a number of thousands of digits, which is not read; take it out") from error


def _hint(path: DataFile, error: json.JSONDecodeError, first: bool) -> str:
    """What the writer of a file has probably meant."""
    if _kind(path) == ".json" and error.msg == "Extra data" and error.lineno > 1:
        return "; one record a line belongs in a file named .jsonl"
    before = error.doc[: error.pos].rstrip()
    if _kind(path) == ".json" and before.endswith(",") and error.doc[error.pos : error.pos + 1] in ("]", "}"):
        return f"; take the comma before the {error.doc[error.pos]} away"
    if first and error.doc.lstrip().startswith(("[", "{")) and error.pos >= len(error.doc.rstrip()):
        return "; a .jsonl file has one whole record a line (one list over many lines belongs in a file named .json)"
    return ""


class Cells(dict[str, str]):
    """A row of a table, all of whose values are texts: what else they may be is for whoever knows the fields."""


def _table(path: DataFile, delimiter: str) -> Iterator[Row]:
    """The rows below a line of names; cells may be quoted and hold line ends then (RFC 4180)."""
    _check_kind(path)
    csv.field_size_limit(_LONGEST_CELL)
    with _opened(path) as file:
        undecodable: list[UserError] = []
        rows = csv.reader(_decoded_lines(file, path, undecodable), delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            first = rows.line_num + 1
            place = f"{path}, line {first}"
            wrong: UserError | None = None
            try:
                row = next(rows, None)
            except csv.Error as error:
                row, wrong = [], _not_a_row(place, error)
            if row is None:
                return
            if names and row and len(row) != len(names):
                wrong = _other_length(place, row, names, delimiter)
            if wrong is not None and rows.line_num > first:
                raise _over_lines(wrong, rows.line_num)
            if undecodable:
                wrong = undecodable[0]
                undecodable.clear()
            if wrong is not None and not names:
                raise wrong
            if wrong is not None:
                yield Row(place, partial(_given, wrong))
            elif row and names:
                yield Row(place, partial(_given, Cells(zip(names, row, strict=True))))
            elif row:
                names = row
                _check_names(place, names, delimiter)


def _not_a_row(place: str, error: csv.Error) -> UserError:
    return UserError(
        f"{place}: is not a row of a table: {error}; a cell that begins with a quote has to "
        "end with one, and quotes in it are written twice"
    )


def _over_lines(wrong: UserError, last: int) -> UserError:
    """What is wrong with the file, not with one of its records: how many are in such a row nobody knows."""
    return UserError(f"{wrong}; the row goes on to line {last}: a quote that is not closed takes in the rows behind it")


def _other_length(place: str, row: Sequence[str], names: Sequence[str], delimiter: str) -> UserError:
    return UserError(
        f"{place}: has {len(row)} cells and the first line names {len(names)}; put a cell that holds "
        f'{"a comma" if delimiter == "," else "a tab"}, a quote or a line end between "", quotes twice'
    )


def _check_names(place: str, names: Sequence[str], delimiter: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f'{place}: the column "{twice[0]}" is there twice; keep one')
    other = next(
        (sign for sign in (";", "\t", ",") if len(names) == 1 and sign != delimiter and sign in names[0]), None
    )
    if other is not None:
        found, wanted = ("tabs" if sign == "\t" else f'"{sign}"' for sign in (other, delimiter))
        hint = "name it .tsv" if other == "\t" else "save it with commas"
        raise UserError(
            f"{place}: names one column, {shown(names[0])}: its cells are parted by {found}, not {wanted}; {hint}"
        )


def _decoded_lines(file: IO[bytes], path: DataFile, undecodable: list[UserError]) -> Iterator[str]:
    """The lines as texts; what is wrong with one that is none goes to `undecodable`."""
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"")
        try:
            yield text.decode()
        except UnicodeDecodeError as error:
            undecodable.append(UserError(_not_utf_8(f"{path}, line {number}", line, error)))
            yield text.decode(errors="replace")


def _not_utf_8(place: str, text: bytes, error: UnicodeDecodeError) -> str:
    start = text.rfind(b"\n", 0, error.start) + 1
    found = f"byte {error.start - start + 1} is 0x{text[error.start]:02x}"
    return f"{place} is not UTF-8 text: {found}; save the file as UTF-8"


def _kind(path: DataFile) -> str:
    return Path(path.name.removesuffix(GZIP)).suffix


@contextmanager
def _opened(path: DataFile) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked."""
    with path.open("rb") as file:
        if path.suffix != GZIP:
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]


def _held(value: Any, keys: Mapping[int, str]) -> str | None:
    """What `keys` has for an object, or for one somewhere in it, by their identity; None: for none."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if id(found) in keys:
            return keys[id(found)]
        waiting += found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return None


class _Batch:
    """Some rows of a Parquet file, made objects when they are read: one by one, or all with the first (`at_once`)."""

    def __init__(self, batch: Any, *, at_once: bool) -> None:
        self._batch, self._at_once = batch, at_once

    @cached_property
    def _rows(self) -> list[Any] | None:
        """None: one by one, which tells which row and column cannot be read where one cannot."""
        try:
            return self._batch.to_pylist() if self._at_once else None
        except _unreadable():
            return None

    @cached_property
    def _columns(self) -> list[tuple[str, Any]]:
        return list(zip(self._batch.schema.names, self._batch.columns, strict=True))

    def row(self, number: int, place: str) -> Any:
        if self._rows is not None:
            return self._rows[number]
        record = {}
        for name, column in self._columns:
            try:
                record[name] = column[number].as_py()
            except _unreadable() as error:
                raise UserError(
                    f'{place}: "{name}" cannot be read: {error}; write the file again without that, or without the '
                    "column"
                ) from error
        return record


def _unreadable() -> tuple[type[Exception], ...]:
    """What pyarrow raises for a value that a Parquet file may hold and Python cannot."""
    from pyarrow import ArrowException

    return (ArrowException, ValueError, OverflowError, LookupError)


def _parquet(path: DataFile, source: str, *, at_once: bool) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with path.open("rb") as raw, parquet.ParquetFile(path if isinstance(path, Path) else raw) as file:
            for found in file.iter_batches(_BATCH):
                batch = _Batch(found, at_once=at_once)
                for i in range(found.num_rows):
                    number += 1
                    place = f"{source}, record {number}"
                    yield Row(place, partial(batch.row, i, place))
    except (pyarrow.ArrowException, OSError) as error:
        _check_kind(path, but=b"PAR1")
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _check_kind(path: DataFile, but: bytes = b"") -> None:
    """Raise UserError if a file begins as something else does (`but`: as anything but this)."""
    with _opened(path) as file:
        head = file.read(_HEAD)
    for start, what in _KINDS:
        if start != but and head[: len(start)].lower() == start.lower():
            raise UserError(f"{path} is {what}")
    if b"\0" in head and not but:
        raise UserError(f"{path} is no text that can be read: it holds zero bytes (UTF-16, or a binary file)")
