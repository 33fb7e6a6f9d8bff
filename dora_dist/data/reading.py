"""Records of any kind to data sets: read, checked, encoded once a node, held out, selected, counted."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_dist.config import DataConfig
from dora_dist.config.mixture import MixtureSource, mixture_of, names_of
from dora_dist.config.names import Sources, by_task, listed
from dora_dist.data.bad_records import BadRecords, encode_usable, usable
from dora_dist.data.cache import cached
from dora_dist.data.columns import BAD, Columns, Table
from dora_dist.data.doubts import Doubts, pack_doubts, say
from dora_dist.data.files import DataFile, Row, read_rows
from dora_dist.data.mixture import Mixture
from dora_dist.data.ragged import RaggedDataset, TokenizedData
from dora_dist.data.reader import Reader
from dora_dist.data.records import Record, files_of
from dora_dist.data.stats import Stats
from dora_dist.data.stream import Source, StreamedDataset, window_shares
from dora_dist.runtime import console
from dora_dist.runtime.errors import UserError

CHUNK = 1000
"""Records encoded at once: enough to keep the tokenizer's threads busy."""


def read(
    reader: Reader, data: DataConfig, *, seed: int, progress: bool = True, places: int | None = None
) -> TokenizedData:
    """The training and the validation set of a run; the same on every rank, and at every world size.

    `data` says which records, and which of them are for validation: those of data.validation, or else
    data.validation_samples records of data.train that `seed` chooses. Raises UserError, naming source and line or
    record, for a file that cannot be read and a record that its reader refuses; and when nothing is left to learn from.

    places: with data.streaming, the records that all steps of the run take.
    """
    mixture = mixture_of(data.train)
    for each in [reader, *(reader.of_format(source.format) for source in mixture if source.format)]:
        each.check()
    training: tuple[RaggedDataset, Stats]
    if data.streaming:
        assert places is not None
        training = streamed(reader, data, places, seed=seed)
        if data.validation is None:
            return TokenizedData(*training)
        table = _table(reader, data, "validation", progress)
        return TokenizedData(*training, *_selected(reader, table, _all_of(reader, table), "data.validation"))
    train = _table(reader, data, "train", progress)
    if data.validation is not None:
        table, where = _table(reader, data, "validation", progress), "data.validation"
        rest, chosen = _all_of(reader, train), _all_of(reader, table)
    else:
        table, where = train, "the validation samples"
        numbers = reader.record_numbers(train)
        held = torch.tensor(sorted(held_out(int(numbers[-1]) + 1, data.validation_samples, seed)), dtype=torch.int64)
        of_held = torch.isin(numbers, held)
        rest, chosen = (~of_held).nonzero()[:, 0], of_held.nonzero()[:, 0]
    training = _selected(reader, train, rest, "data.train")
    if mixture:
        training = _mixed(training[0], mixture), training[1]
    return TokenizedData(*training, *(_selected(reader, table, chosen, where) if len(chosen) else ()))


def _all_of(reader: Reader, table: Table) -> Tensor:
    return torch.arange(len(reader.record_numbers(table)))


def streamed(reader: Reader, data: DataConfig, places: int, *, seed: int) -> tuple[StreamedDataset, Stats]:
    """The training set as a stream of so many places, and figures of its first records (data.streaming).

    Raises UserError as `read` does, of the first records of each source.
    """
    mixture = mixture_of(data.train)
    names = names_of(mixture) or ["data.train"]
    order = seed if data.shuffle_buffer > 1 else None
    sources = [
        Source(each, _files(named), name, seed=order)
        for (each, named), name in zip(_parts(reader, data.train), names, strict=True)
    ]
    looked_at = [_begun(source, data.shuffle_buffer) for source in sources]
    bad, field = BadRecords(skip=data.bad_records == "skip"), "the first records of data.train"
    firsts = zip(sources, looked_at, strict=True)
    parts = [(source.reader, _usable(source.reader, first, bad)) for source, (first, _) in firsts]
    table = encoded(reader, parts, field, bad=bad, mixed=bool(mixture))
    say(field, table["doubts"])
    head, stats = _selected(reader, table, _all_of(reader, table), field)
    mixed = Mixture(tuple(names), tuple(each.weight for each in mixture) or (1.0,))
    sizes = [size for _, size in looked_at]
    shares = window_shares(mixed.drawn, data.shuffle_buffer, sizes)
    if 0 in shares:
        raise UserError(
            f'data.train, source {shares.index(0) + 1} ("{names[shares.index(0)]}") is never drawn: its weight is less '
            f"than one of the {sum(shares):,} records that are shuffled at a time; raise it, or data.shuffle_buffer = "
            f"{data.shuffle_buffer}, or take the source out"
        )
    for source, size, share in zip(sources, sizes, shares, strict=True):
        source.size = size if size is not None and share > size else None
    if mixture:
        head = RaggedDataset(reader, table, head.index, mixed)
    return StreamedDataset(head, sources, shares, places=places, seed=seed), stats


def _files(named: Sources) -> list[DataFile]:
    """The files of a source that is a stream. Raises UserError for a name that holds no records, as all readers do."""
    found: list[DataFile] = []
    for name in listed(named):
        files = files_of([name], "train", fetch=False)
        if not any(True for file in files for _ in islice(read_rows(file, str(file)), 1)):
            raise UserError(f"{name} holds no records")
        found += files
    return found


def _begun(source: Source, most: int) -> tuple[list[Row], int | None]:
    """The first rows of a source, and how many it has, None where more than `most`."""
    rows = source.one_pass()
    first = list(islice(rows, CHUNK))
    number = len(first) + sum(1 for _ in islice(rows, max(most + 1 - len(first), 0)))  # counted, not kept
    return first, number if number <= most else None


def _usable(reader: Reader, rows: Iterable[Row], bad: BadRecords) -> Iterator[tuple[str, Record]]:
    for row in rows:
        try:
            yield row.place, reader.record(row)
        except UserError as error:
            bad.take(error)


def _mixed(train: RaggedDataset, sources: Sequence[MixtureSource]) -> RaggedDataset:
    """The set as a mixture of its sources. Raises UserError for one that nothing can be learnt from, or that is
    never drawn."""
    mixture = Mixture(tuple(names_of(sources)), tuple(source.weight for source in sources))
    mixed = RaggedDataset(train.reader, train.table, train.index, mixture)
    for number, share in enumerate(mixed.shares, start=1):
        if not share.samples:
            raise UserError(
                f'data.train, source {number} ("{share.name}") has no sample to learn from; look at its data, raise '
                "data.cutoff_len, or take the source out"
            )
        if not share.drawn:
            raise UserError(
                f'data.train, source {number} ("{share.name}") is never drawn: its weight is less than one of the '
                f"{share.all_drawn:,} samples of an epoch; raise it, or take the source out"
            )
    return mixed


def held_out(records: int, wanted: int, seed: int) -> set[int]:
    """Which of `records` are held out for validation. Raises UserError if none would be left."""
    if wanted >= records:
        raise UserError(
            f"data.validation_samples is {wanted} but data.train holds {records} records; "
            "hold out fewer, or name a file in data.validation"
        )
    return set(torch.randperm(records, generator=torch.Generator().manual_seed(seed))[:wanted].tolist())


def _selected(reader: Reader, table: Table, index: Tensor, where: str) -> tuple[RaggedDataset, Stats]:
    kept, stats = reader.select(table, index, where)
    return RaggedDataset(reader, table, kept), stats


def _table(reader: Reader, data: DataConfig, split: str, progress: bool) -> Table:
    """The records of a split, encoded; from the cache where they are in it."""
    named = getattr(data, split)
    sources = listed(named)
    # What is odd about the records, and where they are, is said with the names of the sources.
    settings = {"reader": type(reader).__qualname__, **reader.settings(), "sources": by_task(named) or sources}
    settings["bad_records"] = data.bad_records
    if mixture := mixture_of(named):
        settings["mixture"] = [[*listed(source.path), source.format] for source in mixture]
    table = cached(
        data.cache,
        sources,
        reader.tokenizer,
        settings,
        code=_code_of(reader) if data.cache is not None else (),
        make=lambda: _encoded(reader, named, split, progress),
    )
    say(f"data.{split}", table["doubts"])
    return reader.opened(table, f"data.{split}")


def _parts(reader: Reader, sources: Sources) -> list[tuple[Reader, Sources]]:
    """The sources of a split with what reads each: those of a mixture one by one, all others together."""
    mixture = mixture_of(sources)
    return [(reader.of_format(source.format) if source.format else reader, source.path) for source in mixture] or [
        (reader, sources)
    ]


def validation_records(rows: RaggedDataset, data: DataConfig, *, most: int) -> Iterator[tuple[str, Record]]:
    """The format and the record of the first samples, `most` of them, of the validation set that `read` made of `data`.

    Its files are read again, as far as it takes. Raises UserError.
    """
    split = "train" if data.validation is None else "validation"
    wanted = set(rows.records[:most].tolist())
    number, bad = -1, BadRecords(skip=data.bad_records == "skip")
    for reader, named in _parts(rows.reader, getattr(data, split)):
        for place, record in reader.records(named, split, bad.take):
            if bad.skip and not usable(reader, place, record):
                continue
            number += 1
            if number in wanted:
                yield reader.data.format, record
            if number >= max(wanted):
                return


def _code_of(reader: Reader) -> set[Path]:
    return {Path(inspect.getfile(kind)) for kind in type(reader).__mro__ if issubclass(kind, Reader)}


def _encoded(reader: Reader, sources: Sources, split: str, progress: bool) -> dict[str, Tensor]:
    bad = BadRecords(skip=reader.data.bad_records == "skip")
    parts = [(each, each.records(named, split, bad.take)) for each, named in _parts(reader, sources)]
    mixed = bool(mixture_of(sources))
    return encoded(reader, parts, f"data.{split}", bad=bad, mixed=mixed, progress=progress)


def encoded(
    reader: Reader,
    parts: Sequence[tuple[Reader, Iterable[tuple[str, Record]]]],
    field: str,
    *,
    bad: BadRecords,
    mixed: bool,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The records of some parts, each with its reader, as one table; `mixed`: which says where each part begins."""
    into, doubts, bounds = Columns(), Doubts(reader.tokenizer, but=reader.allowed), [0]
    for number, (each, found) in enumerate(parts, start=1):
        records = list(found)
        known = into.records + bad.count + len(records)
        bar: Any = console.progress(
            len(records), f"tokenizing {field}", f" {each.counted}", delay=2.0, leave=False, shown=progress
        )
        with bar:
            for first in range(0, len(records), CHUNK):
                chunk = [(each.place(place, record), record) for place, record in records[first : first + CHUNK]]
                encode_usable(each, chunk, into, doubts, bad=bad)
                bar.update(len(chunk))
                if number == len(parts):  # they are all: a set of which every record is bad is not tried to its end
                    bad.check(field, known, left=max(len(records) - first - CHUNK, 0))
        bounds.append(into.records)
    left_out = bad.found(field, into.records)
    # Else what is saved of the tokenizer would depend on whether it or the cache had the tokens.
    reader.tokenizer.backend_tokenizer.no_truncation()
    reader.tokenizer.backend_tokenizer.no_padding()
    table = into.table()
    if mixed:
        table["sources"] = torch.tensor(bounds)
    learnt = " or ".join(dict.fromkeys(each.learnt for each, _ in parts))
    doubted = doubts.found(field, learnt, may_be_empty=all(each.learns_without for each, _ in parts))
    said = pack_doubts([*left_out, *doubted, *reader.remarks(table)])
    return {**table, "doubts": said, BAD: torch.tensor([bad.count])}
