"""The data set of every task: some rows of a table, which the reader of their kind turns into samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dora_dist.data import columns
from dora_dist.data.columns import Table
from dora_dist.data.mixture import SHARES, Mixture, Share, shares, sources_of
from dora_dist.data.preview import Preview
from dora_dist.data.reader import Reader
from dora_dist.data.sampler import EpochOrder
from dora_dist.data.stats import Stats


class RaggedDataset(Dataset[dict[str, Any]]):
    """Samples of different lengths, held in tensors alone: loader processes would copy lists, page by page."""

    def __init__(self, reader: Reader, table: Table, index: Tensor, mixture: Mixture | None = None) -> None:
        """index: (k,) int64, which rows of the table are here. mixture: of which sources, by column "sources"."""
        self.reader, self.table, self.index, self.mixture = reader, table, index, mixture
        self.sources = None if mixture is None else sources_of(table["sources"], self.records)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Sample i; i + k·len(self), which only an epoch's order asks for, is its variant k.

        Of a mixture it has the number of its "source".
        """
        variant, i = divmod(i, len(self))
        row = int(self.index[i])
        sample = self.reader.variant(self.table, row, variant) if variant else self.reader.item(self.table, row)
        return sample if self.sources is None else {**sample, "source": int(self.sources[i])}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def preview(self, i: int) -> Preview:
        """Sample i, for a person."""
        return self.reader.preview(self.table, int(self.index[i]))

    @property
    def records(self) -> Tensor:
        """(samples,) int64, ascending: which record each sample is of."""
        return self.reader.record_numbers(self.table)[self.index]

    def first(self, count: int) -> RaggedDataset:
        """The samples of the first `count` records alone."""
        numbers = self.records
        kept = numbers.unique_consecutive()[:count]
        return RaggedDataset(self.reader, self.table, self.index[torch.isin(numbers, kept)])

    @property
    def bad(self) -> int:
        """How many records of the sources cannot be used and are left out (data.bad_records)."""
        return int(self.table[columns.BAD]) if columns.BAD in self.table else 0

    @property
    def lengths(self) -> Tensor:
        """(samples,) int64: tokens of each as the model takes them."""
        return self.reader.lengths(self.table)[self.index]

    @property
    def longest(self) -> int:
        """The most tokens that a sample has, as the model takes them."""
        return int(self.lengths.max())

    def token_counts(self) -> dict[str, Tensor]:
        """(samples,) tokens of each before anything is cut where that is known, by the words for them."""
        return {words: counts[self.index] for words, counts in self.reader.token_counts(self.table).items()}

    def token_ids(self) -> list[Tensor]:
        """All token ids, flat."""
        return [self.table[name] for name in self.reader.tokens]

    def refuse_tokens(self, rows: int) -> None:
        """Samples that are still to be read may have only tokens below `rows`; all others have been looked at."""

    def contents(self) -> Iterator[bytes]:
        """Each sample as bytes: two that are equal are one sample."""
        return self.reader.contents(self.table, self.index)

    def in_both(self, other: RaggedDataset) -> int:
        """How many samples `other` has, too."""
        ours, theirs = self.reader.keys(self.table, self.index), other.reader.keys(other.table, other.index)
        alike = self._chosen(torch.isin(ours, theirs)), other._chosen(torch.isin(theirs, ours))
        known = {_digest(content) for content in alike[1].contents()}
        return sum(_digest(content) in known for content in alike[0].contents())

    def _chosen(self, which: Tensor) -> RaggedDataset:
        return RaggedDataset(self.reader, self.table, self.index[which])

    def columns(self) -> dict[str, Tensor | Iterable[str]]:
        """All that samples and metrics follow from, by name."""
        return self.reader.columns(self.table, self.index)

    def fingerprint(self) -> str:
        """A short text that differs where any of `columns` does."""
        return columns.fingerprint(self.columns())

    def identity(self) -> str:
        """As `fingerprint`, for a person."""
        return f"{len(self):,} samples, sha256 {self.fingerprint()}"

    def described(self, stats: Stats) -> str:
        """The set for the log, with its figures."""
        return str(stats)

    @property
    def references(self) -> Any:
        """The right answers that metrics compare a model's answers with, where labels alone do not hold them."""
        return self.reader.references(self.table, self.index)

    def check_model(self, model: Any) -> None:
        """Raise UserError where a model, whose weights need not be read yet, cannot take the samples."""
        self.reader.check_model(self.table, model)

    def shown(self) -> Mapping[str, int]:
        """The samples that a person should see, by title."""
        return self.reader.shown(self.table, self.index)

    @property
    def parts(self) -> dict[str, int]:
        """How many samples an epoch has of each kind, no two of which share a global batch."""
        return self.reader.parts(self.table, self.index)

    @property
    def epoch_order(self) -> EpochOrder | None:
        """The order of an epoch, where it is more than a permutation."""
        if self.mixture is None or self.sources is None:
            return self.reader.order(self.table, self.index)
        return self.mixture.order(self.sources, lambda drawn: self.reader.order(self.table, self.index[drawn]))

    @property
    def shares(self) -> Sequence[Share]:
        """What an epoch has of each source of a mixture."""
        return () if self.mixture is None or self.sources is None else shares(self.mixture, self.sources)

    @property
    def order_facts(self) -> dict[str, Any]:
        """What an epoch's order follows from, besides seed, batch size, number of samples and `parts`."""
        facts = self.reader.order_facts(self.table, self.index)
        if self.mixture is None:
            return facts
        return {**facts, SHARES: [[share.samples, share.drawn] for share in self.shares]}


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclass(frozen=True)
class TokenizedData:
    """What a run trains and validates on, and what became of the records."""

    train: RaggedDataset
    train_stats: Stats
    validation: RaggedDataset | None = None
    validation_stats: Stats | None = None

    def token_ids(self) -> list[Tensor]:
        """All token ids of both sets, flat."""
        return [ids for rows in (self.train, self.validation) if rows is not None for ids in rows.token_ids()]
