"""Records as columns of tensors, and a short text that differs where any of them does.

A table is a dictionary of tensors: a cache file can hold it, and loader processes share its pages. A column has one
value a sample, or it is ragged: `tokens` (T,) with `starts` (n + 1,), where the row of sample i is
tokens[starts[i]:starts[i + 1]]. Texts are ragged columns of bytes (strings.py).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from dora_dist.data.strings import pack

IGNORED = -100
"""A label that carries no loss, as in torch.nn.CrossEntropyLoss."""
BAD = "bad records"
"""How many records a table does not have because they cannot be used: (1,) int64."""
Table = Mapping[str, Tensor]
_LOOKED_AT = 16
_FACTOR = 1_000_003  # prime; products wrap around


class Mark(NamedTuple):
    """How much of each column there was."""

    records: int
    ends: list[dict[Any, int]]


class Columns:
    """A table while it is made, sample after sample."""

    def __init__(self) -> None:
        self.records = 0  # already taken in; whoever reads them counts them here
        self._flat: dict[str, array[int]] = {}
        self._values: dict[str, list[Any]] = {}
        self._strings: dict[tuple[str, str], list[str]] = {}

    def ragged(self, starts: str, **rows: Sequence[int]) -> None:
        """Append a sample's row, all of one length, to each column that shares the column `starts`."""
        for name, row in rows.items():
            self._flat.setdefault(name, array("i")).extend(row)
        self.bounds(starts, len(next(iter(rows.values()))))

    def bounds(self, starts: str, length: int) -> None:
        """Append the bound of a row of `length` to the column `starts`."""
        column = self._values.setdefault(starts, [0])
        column.append(column[-1] + length)

    def values(self, **values: float | tuple[float, ...]) -> None:
        """Append a sample's value to each column: whole numbers become int64, others float64, flags bool."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def strings(self, starts: str, **strings: Iterable[str]) -> None:
        """Append any number of texts to a column, whose own starts are the column `starts`."""
        [(name, texts)] = strings.items()
        self._strings.setdefault((name, starts), []).extend(texts)

    def mark(self) -> Mark:
        """Where the columns end now, for `back_to`."""
        return Mark(self.records, [{name: len(each) for name, each in kind.items()} for kind in self._kinds])

    def back_to(self, mark: Mark) -> None:
        """Take back what was appended since."""
        self.records = mark.records
        for kind, ends in zip(self._kinds, mark.ends, strict=True):
            for name in list(kind):
                if name in ends:
                    del kind[name][ends[name] :]
                else:
                    del kind[name]

    @property
    def _kinds(self) -> tuple[dict[Any, Any], ...]:
        return self._flat, self._values, self._strings

    def table(self) -> dict[str, Tensor]:
        arrays: dict[str, Any] = {**self._flat, **self._values}
        table = {name: torch.from_numpy(numpy.asarray(values)) for name, values in arrays.items()}
        for (name, starts), texts in self._strings.items():
            table[name], table[starts] = pack(texts)
        return table


def row_of(table: Table, row: int, name: str, starts: str = "starts") -> Tensor:
    """A row of a ragged column."""
    return table[name][table[starts][row] : table[starts][row + 1]]


def taken(values: Tensor, starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of a ragged column as one of their own: values, starts."""
    lengths = starts.diff()[rows]
    its_starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    shifts = (starts[rows] - its_starts[:-1]).repeat_interleave(lengths)
    return values[torch.arange(len(shifts)) + shifts], its_starts


def pieces(values: Tensor, starts: Tensor, rows: Tensor) -> Iterator[bytes]:
    """The bytes of each of some rows of a ragged column."""
    bounds = starts.tolist()
    return (values[bounds[i] : bounds[i + 1]].numpy().tobytes() for i in rows.tolist())


def row_keys(values: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """(k,) int64 for some rows of a ragged column of whole numbers: equal for rows that are equal.

    Different rows seldom share one: it follows from a row's length and `_LOOKED_AT` of its elements, evenly spaced.
    """
    first, lengths = starts[rows], starts.diff()[rows]
    padded = values if len(values) else values.new_zeros(1)
    keys = lengths.clone()
    for number in range(_LOOKED_AT):
        place = first + (lengths - 1).clamp(min=0) * number // (_LOOKED_AT - 1)
        keys.mul_(_FACTOR).add_(padded[place.clamp(max=len(padded) - 1)].where(lengths > 0, 0))
    return keys


def counts_between(flags: Tensor, starts: Tensor) -> Tensor:
    """(n,) int64: how many of flags[starts[i]:starts[i + 1]] are true, for starts (n + 1,)."""
    before = torch.cat([torch.zeros(1, dtype=torch.int64), flags.cumsum(0)])
    return before[starts[1:]] - before[starts[:-1]]


def fingerprint(columns: Mapping[str, Tensor | Iterable[str]]) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of all columns: names, types, shapes and every element."""
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        if isinstance(column, Tensor):
            digest.update(f"{name} {column.dtype} {tuple(column.shape)}\n".encode())
            digest.update(column.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            continue
        digest.update(f"{name} texts\n".encode())
        for text in column:
            encoded = text.encode(errors="surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))  # where one text ends is content, too
            digest.update(encoded)
    return digest.hexdigest()[:12]
