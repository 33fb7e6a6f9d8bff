"""Training data as a stream: read forward while a run trains, never whole in memory.

Every rank reads the rows of all sources, and decodes and tokenizes those of its own places in the global batches alone.
So the order knows nothing of the world size, and the place where a run is follows from its step: a checkpoint need not
hold it, and a run goes on, at any number of ranks, by reading over what was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import torch

from dora_dist.data.columns import Columns
from dora_dist.data.doubts import Doubts
from dora_dist.data.files import DataFile, Row, read_rows
from dora_dist.data.mixture import SHARES, Share
from dora_dist.data.ragged import RaggedDataset
from dora_dist.data.reader import Reader
from dora_dist.data.sampler import SAMPLES, EpochOrder
from dora_dist.data.stats import Stats
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.hub import RemoteFile

_EDGE = 1 << 16  # bytes


class Problem(NamedTuple):
    """Why a place of a batch has no record; field: what says whether that ends the run, None: it always does."""

    text: str
    field: str | None


class Source:
    """The rows of some files, pass after pass, by number; in each pass the files come in an order of its own."""

    def __init__(self, reader: Reader, files: Sequence[DataFile], name: str, *, seed: int | None) -> None:
        """seed: of the files' order; None: as they are given."""
        self.reader, self.files, self.name, self._seed = reader, files, name, seed
        self.size: int | None = None
        """Its rows, where a window of the stream has several passes of it: they are kept then, once read."""
        self._kept: dict[int, list[Row]] = {}
        self._rows: Iterator[Row] | None = None
        self._next = 0

    def take(self, first: int, number: int) -> list[Row]:
        """Rows `first` up to first + number, counted through all passes; cheap where they follow those taken last.

        Raises UserError for a file that cannot be read.
        """
        if self._rows is None or first < self._next:
            self._rows, self._next = self._passes(), 0
        rows = list(islice(self._rows, first - self._next, first - self._next + number))
        self._next = first + number
        return rows

    def one_pass(self, order: Sequence[int] | None = None) -> Iterator[Row]:
        """Every row once. order: of the files; None: as they are given."""
        for k in range(len(self.files)) if order is None else order:
            yield from self._of_file(k)

    def _of_file(self, number: int) -> Iterable[Row]:
        rows = read_rows(self.files[number], str(self.files[number]))
        if self.size is None:
            return rows
        if number not in self._kept:
            self._kept[number] = list(rows)
        return self._kept[number]

    def edges(self) -> Iterator[bytes]:
        """A text about each file's size and its first and last bytes, or what the hub knows it by."""
        for path in self.files:
            if isinstance(path, RemoteFile):
                yield f"{path}@{path.content}".encode()
                continue
            with path.open("rb") as file:
                start = file.read(_EDGE)
                size = file.seek(0, 2)
                file.seek(max(size - _EDGE, 0))
                yield f"{size} ".encode() + hashlib.sha256(start + file.read(_EDGE)).digest()

    def _passes(self) -> Iterator[Row]:
        for number in count():
            row = None
            for row in self.one_pass(self._order(number)):
                yield row
            if row is None:
                raise UserError(f"{', '.join(map(str, self.files))}: no records are left")

    def _order(self, number: int) -> list[int] | None:
        if self._seed is None:
            return None
        order: list[int] = torch.randperm(len(self.files), generator=_generator(self._seed, number, 1)).tolist()
        return order

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None, "_kept": {}}  # a loader process begins by itself


class StreamedDataset(RaggedDataset):
    """The places of a run's batches, in order; what is at each is read when its turn comes.

    Rows are taken in windows: of each source its share, in the order of its files, and all of them shuffled, but no
    row of a source of fewer rows comes again before all others have come.
    As a set of samples, to be looked at, it is `head`, the first of the stream.
    """

    def __init__(
        self, head: RaggedDataset, sources: Sequence[Source], shares: Sequence[int], *, places: int, seed: int
    ) -> None:
        """shares: rows of each source in a window. places: of all batches of the run."""
        super().__init__(head.reader, head.table, head.index, head.mixture)
        self._sources, self._shares, self._places, self._seed = sources, tuple(shares), places, seed
        self._window: tuple[int, list[tuple[int, Row]]] = (-1, [])
        self._broken: Problem | None = None
        self._rows: int | None = None
        self._doubts = Doubts(head.reader.tokenizer, but=head.reader.allowed)  # said of the head

    def __len__(self) -> int:
        return self._places

    def __getitem__(self, i: int) -> dict[str, Any]:
        """What is at place i: a sample, or a "problem" alone, which says why there is none."""
        if self._broken is not None:
            return {"problem": self._broken}
        place = f"record {i + 1:,} of the stream"
        try:
            source, row = self._at(i)
            place = row.place
            return self._prepared(source, row)
        except UserError as error:  # on one rank, it may be: all ranks learn of it before they take the step
            self._broken = Problem(str(error), None)
        except Exception as error:  # of a library or of a plugin's reader: the others learn of this, too
            self._broken = Problem(f"{place} cannot be read: {type(error).__name__}: {error}", None)
        return {"problem": self._broken}

    def refuse_tokens(self, rows: int) -> None:
        self._rows = rows

    @property
    def bad(self) -> int:
        """None is known: they are counted when their turn comes."""
        return 0

    @property
    def longest(self) -> int:
        """What a sample that is still to be read may have."""
        return self.reader.data.longest_text

    def head(self) -> RaggedDataset:
        """The first samples of the stream, as a set."""
        return RaggedDataset(self.reader, self.table, self.index, self.mixture)

    def _at(self, place: int) -> tuple[int, Row]:
        """A row, and the number of its source."""
        number, offset = divmod(place, sum(self._shares))
        if self._window[0] != number:
            self._window = number, self._taken(number)
        return self._window[1][offset]

    def _taken(self, number: int) -> list[tuple[int, Row]]:
        """The rows of a window, each with the number of its source."""
        rows: list[tuple[int, Row]] = []
        passes: list[int] = []
        for k, (source, n) in enumerate(zip(self._sources, self._shares, strict=True)):
            rows += [(k, row) for row in source.take(number * n, n)]
            passes += [0 if source.size is None else i // source.size for i in range(number * n, number * n + n)]
        order = torch.randperm(len(rows), generator=_generator(self._seed, number, 0)).tolist()
        turns: list[list[int]] = [[] for _ in self._sources]
        for j in sorted(order, key=passes.__getitem__):  # within a pass it stays as it is
            turns[rows[j][0]].append(j)
        each = [iter(turn) for turn in turns]
        return [rows[next(each[rows[j][0]])] for j in order]

    def _prepared(self, source: int, row: Row) -> dict[str, Any]:
        reader, into = self._sources[source].reader, Columns()
        try:
            record = reader.record(row)
            reader.encode([(reader.place(row.place, record), record)], into, self._doubts)
        except UserError as error:
            return {"problem": Problem(str(error), "data.bad_records")}
        table = into.table()
        largest = max((int(table[name].max()) for name in reader.tokens if len(table[name])), default=-1)
        if self._rows is not None and largest >= self._rows:
            token = reader.tokenizer.convert_ids_to_tokens(largest)
            why = f"has the token {token!r} of id {largest}, and the model's embedding has {self._rows} rows"
            return {"problem": Problem(f"{row.place}: {why}", "data.bad_records")}
        if not reader.teaches(table)[0]:
            why = f"has no token to learn from within data.cutoff_len = {reader.data.longest_text}"
            return {"problem": Problem(f"{row.place}: {why}", "data.cutoff_len")}
        sample = reader.item(table, 0)
        return sample if self.mixture is None else {**sample, "source": source}

    def described(self, stats: Stats) -> str:
        window = sum(self._shares)
        order = f"shuffled over {window:,} records at a time" if window > 1 else "in the order of its files"
        if self.mixture is not None:
            taken = zip(self.mixture.names, self._shares, strict=True)
            order += f" ({', '.join(f'{n:,} of {name}' for name, n in taken)})"
        return f"a stream, {order}; of the first records: {stats}"

    def identity(self) -> str:
        digest = hashlib.sha256(self.head().fingerprint().encode())
        for source in self._sources:
            digest.update(b"".join(source.edges()))
        files = sum(len(source.files) for source in self._sources)
        return f"a stream of {files:,} file{'' if files == 1 else 's'}, sha256 {digest.hexdigest()[:12]}"

    def fingerprint(self) -> str:
        return self.identity()

    @property
    def parts(self) -> dict[str, int]:
        return {"": self._places}

    @property
    def epoch_order(self) -> EpochOrder | None:
        return lambda seed, batch: range(self._places)

    @property
    def shares(self) -> Sequence[Share]:
        """None: how many samples a source has is not known."""
        return ()

    @property
    def order_facts(self) -> dict[str, Any]:
        """With the number of samples, which is not known; that of places changes with training.max_steps."""
        return {SAMPLES: None, SHARES: [list(self._shares)]}


def _generator(seed: int, number: int, kind: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 1_000_003 + number) * 8191 + kind) % 2**62)


def window_shares(drawn: Callable[[int], list[int]], buffer: int, sizes: Sequence[int | None]) -> list[int]:
    """Rows of each source in a window of `buffer` rows.

    drawn: the shares of sources in so many rows. sizes: the rows of each source, None where more than `buffer`.
    A single source that fits into a window is shuffled whole, pass by pass.
    """
    return drawn(min(buffer, sizes[0] or buffer) if len(sizes) == 1 else buffer)
