"""Records of any kind to data sets: read, checked, encoded once a node, held out, selected, counted."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
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
from dora_dist.data.mixture import Mixture
from dora_dist.data.ragged import RaggedDataset, TokenizedData
from dora_dist.data.reader import Reader
from dora_dist.data.records import Record
from dora_dist.data.stats import Stats
from dora_dist.runtime import console
from dora_dist.runtime.errors import UserError

CHUNK = 1000
"""Records encoded at once: enough to keep the tokenizer's threads busy."""


def read(reader: Reader, data: DataConfig, *, seed: int, progress: bool = True) -> TokenizedData:
    """The training and the validation set of a run; the same on every rank, and at every world size.

    `data` says which records, and which of them are for validation: those of data.validation, or else
    data.validation_samples records of data.train that `seed` chooses. Raises UserError, naming source and line or
    record, for a file that cannot be read and a record that its reader refuses; and when nothing is left to learn from.
    """
    mixture = mixture_of(data.train)
    for each in [reader, *(reader.of_format(source.format) for source in mixture if source.format)]:
        each.check()
    train = _table(reader, data, "train", progress)
    if data.validation is not None:
        table, where = _table(reader, data, "validation", progress), "data.validation"
        rest, chosen = (torch.arange(len(reader.record_numbers(rows))) for rows in (train, table))
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
    field, mixture = f"data.{split}", mixture_of(sources)
    parts = _parts(reader, sources)
    into, doubts, bounds = Columns(), Doubts(reader.tokenizer, but=reader.allowed), [0]
    bad = BadRecords(skip=reader.data.bad_records == "skip")
    for each, named in parts:
        records = list(each.records(named, split, bad.take))
        bar: Any = console.progress(
            len(records), f"tokenizing {field}", f" {each.counted}", delay=2.0, leave=False, shown=progress
        )
        with bar:
            for first in range(0, len(records), CHUNK):
                chunk = [(each.place(place, record), record) for place, record in records[first : first + CHUNK]]
                encode_usable(each, chunk, into, doubts, bad=bad)
                bar.update(len(chunk))
        bounds.append(into.records)
    left_out = bad.found(field, into.records)
    # Else what is saved of the tokenizer would depend on whether it or the cache had the tokens.
    reader.tokenizer.backend_tokenizer.no_truncation()
    reader.tokenizer.backend_tokenizer.no_padding()
    table = into.table()
    if mixture:
        table["sources"] = torch.tensor(bounds)
    learnt = " or ".join(dict.fromkeys(each.learnt for each, _ in parts))
    found = doubts.found(field, learnt, may_be_empty=all(each.learns_without for each, _ in parts))
    doubted = pack_doubts([*left_out, *found, *reader.remarks(table)])
    return {**table, "doubts": doubted, BAD: torch.tensor([bad.count])}
