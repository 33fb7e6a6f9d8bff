"""What a kind of record says of itself: which fields it needs, how it becomes columns, what a sample of it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_dist.config import DataConfig
from dora_dist.config.names import Sources, listed
from dora_dist.data.columns import BAD, Columns, Table, pieces, row_keys
from dora_dist.data.doubts import Doubts
from dora_dist.data.files import Row
from dora_dist.data.preview import Preview, longest
from dora_dist.data.records import OnBad, Record, read_records, record_of
from dora_dist.data.sampler import EpochOrder
from dora_dist.data.stats import Stats
from dora_dist.runtime.errors import UserError


class Reader(ABC):
    """One kind of record. `read` calls it for the records, `RaggedDataset` for the samples; both do all the rest.

    A sample is a row of a table; `index` (k,) int64 says which rows a data set has.
    """

    counted: ClassVar[str] = "samples"  # what the progress bar counts
    follows_from: ClassVar[tuple[str, ...]] = ("format", "cutoff_len")  # fields of DataConfig that `encode` uses
    starts: ClassVar[str] = "starts"  # the column that has an entry a sample, and one more
    tokens: ClassVar[tuple[str, ...]] = ("tokens",)  # columns of token ids, which a model looks up in its embedding
    notes: ClassVar[tuple[str, ...]] = ()  # columns for figures and messages, which samples and metrics do not use
    allowed: str | None = None  # a special token that may be in a text

    def __init__(self, data: DataConfig, tokenizer: Any) -> None:
        self.data, self.tokenizer = data, tokenizer

    def of_format(self, format: str) -> Reader:
        """The same for records of another format that the task has."""
        other = copy(self)
        other.data = self.data.model_copy(update={"format": format})
        return other

    # --- records --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def fields(self) -> Mapping[str, type]:
        """What a record must have, and of which type."""

    @property
    def named_by(self) -> Mapping[str, str]:
        """Fields of the configuration whose values are names of `fields`, if any."""
        return {}

    @property
    @abstractmethod
    def learnt(self) -> str:
        """Words for what is learnt of a record."""

    @property
    def learns_without(self) -> bool:
        """Whether something is learnt of a record in which that is empty."""
        return False

    def settings(self) -> dict[str, Any]:
        """All that `encode` follows from, besides records, tokenizer and code."""
        return {name: getattr(self.data, name) for name in self.follows_from}

    def check(self) -> None:
        """Raise UserError for what no record can be blamed for."""
        return

    def records(self, sources: Sources, split: str, bad: OnBad | None = None) -> Iterator[tuple[str, Record]]:
        """All records that data.train or data.validation names, each with its place.

        bad: takes what is wrong with a record that cannot be used, which is then left out. Raises UserError.
        """
        return read_records(listed(sources), self.fields, split, named_by=self.named_by, bad=bad)

    def record(self, row: Row) -> Record:
        """A row of a source as a record. Raises UserError, which begins with the row's place."""
        return record_of(row, self.fields, named_by=self.named_by)

    def place(self, place: str, record: Record) -> str:
        """Where a record is, for messages."""
        return place

    @abstractmethod
    def encode(self, records: Sequence[tuple[str, Record]], into: Columns, doubts: Doubts) -> None:
        """Append records, each with its place, to the columns, and show each to `doubts`.

        Raises UserError, which begins with the place, for a record that cannot be used.
        """

    def remarks(self, table: Table) -> list[str]:
        """What is odd about all records together; each is warned of behind the name of the set."""
        return []

    def opened(self, table: Table, field: str) -> Table:
        """The table as it can be used now, with what a cache cannot know of it. Raises UserError, naming `field`."""
        return table

    @abstractmethod
    def select(self, table: Table, index: Tensor, where: str) -> tuple[Tensor, Stats]:
        """Those rows of `index` that can be learnt from, and what the selection did.

        Raises UserError, which names the set as `where`, if none can.
        """

    def teaches(self, table: Table) -> Tensor:
        """(n,) bool: whether anything is learnt of each sample."""
        return torch.ones(len(table[self.starts]) - 1, dtype=torch.bool)

    def check_model(self, table: Table, model: Any) -> None:
        """Raise UserError where a model, whose weights need not be read yet, cannot take the samples."""
        return

    # --- samples --------------------------------------------------------------------------------------------------

    @abstractmethod
    def item(self, table: Table, row: int) -> dict[str, Any]:
        """A sample, as a collator takes it."""

    def variant(self, table: Table, row: int, number: int) -> dict[str, Any]:
        """A sample in another of its variants, numbered from 1, where an epoch's `order` asks for it. IndexError: none.

        `item` is variant 0.
        """
        raise IndexError(f"sample {row} has no variant {number}")

    @abstractmethod
    def preview(self, table: Table, row: int) -> Preview:
        """A sample, for a person."""

    def shown(self, table: Table, index: Tensor) -> Mapping[str, int]:
        """The samples of a set that a person should see, by title: positions in `index`."""
        counts = {words: values[index] for words, values in self.token_counts(table).items()}
        if second := longest(counts):
            return {"first": 0, "longest": second}
        return {"first": 0, "last": len(index) - 1} if len(index) > 1 else {"first": 0}

    def record_numbers(self, table: Table) -> Tensor:
        """(n,) int64, ascending: which record each sample is of, counted from 0."""
        return torch.arange(len(table[self.starts]) - 1)

    def lengths(self, table: Table) -> Tensor:
        """(n,) int64: tokens of each sample as the model takes them."""
        return table[self.starts].diff()

    def token_counts(self, table: Table) -> dict[str, Tensor]:
        """(n,) tokens of each sample before anything is cut where that is known, by the words for them."""
        return {"tokens in a sample": self.lengths(table)}

    def contents(self, table: Table, index: Tensor) -> Iterator[bytes]:
        """Each sample as bytes: two that are equal are one sample."""
        return pieces(table[self.tokens[0]], table[self.starts], index)

    def keys(self, table: Table, index: Tensor) -> Tensor:
        """(k,) int64: samples with equal `contents` have equal keys; others seldom do. Cheap for many samples."""
        return row_keys(table[self.tokens[0]], table[self.starts], index)

    def columns(self, table: Table, index: Tensor) -> dict[str, Tensor | Iterable[str]]:
        """All that samples and metrics follow from, which must be the same on every rank and in a resumed run.

        Checkpoints hold a digest of it: another name or type of a column makes the data look changed.
        """
        notes = {*self.notes, "doubts", BAD}
        return {**{name: column for name, column in table.items() if name not in notes}, "index": index}

    def references(self, table: Table, index: Tensor) -> Any:
        """What metrics compare a model's answers with, where that is more than labels."""
        return None

    def order(self, table: Table, index: Tensor) -> EpochOrder | None:
        """The order of an epoch, where it is more than a permutation."""
        return None

    def parts(self, table: Table, index: Tensor) -> dict[str, int]:
        """How many samples an epoch has of each kind, no two of which share a global batch; by default all are one."""
        return {"": len(index)}

    def order_facts(self, table: Table, index: Tensor) -> dict[str, Any]:
        """What `order` follows from, besides seed, batch size, number of samples and `parts`."""
        return {}


def check_fits(tokenizer: Any, **lengths: int) -> None:
    """Raise UserError if a field of `data` exceeds what the model takes."""
    for field, length in lengths.items():
        if length > tokenizer.model_max_length:
            raise UserError(f"data.{field} = {length}: the model takes {tokenizer.model_max_length} tokens at most")
