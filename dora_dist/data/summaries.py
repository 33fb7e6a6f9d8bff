"""Documents and their summaries, for encoder-decoder models: reading and tokenizing."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dora_dist.data.columns import Columns
from dora_dist.data.dataset import CHUNK, TokenizedData, held_out, pieces
from dora_dist.data.doubts import Doubts, say
from dora_dist.data.preview import Part, Preview, numbers
from dora_dist.data.records import read_records
from dora_dist.data.stats import SummaryStats
from dora_dist.runtime import console
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dora_dist.config import DataConfig


@dataclass(frozen=True)
class _Texts:
    """Tokenized texts: text i is tokens[starts[i]:starts[i + 1]], int32."""

    tokens: Tensor
    starts: Tensor
    cut: list[bool]

    def __getitem__(self, i: int) -> list[int]:
        return self.tokens[self.starts[i] : self.starts[i + 1]].tolist()

    def count(self, samples: Sequence[int]) -> int:
        return int(self.starts.diff()[list(samples)].sum())


class SummaryDataset(Dataset[dict[str, list[int]]]):
    """Some of the samples; item i is {"input_ids", "labels"}: the tokens of a document and of its summary."""

    def __init__(self, documents: _Texts, summaries: _Texts, references: Sequence[str], index: Sequence[int]) -> None:
        self._documents, self._summaries, self._references, self.index = documents, summaries, references, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        sample = self.index[i]
        return {"input_ids": self._documents[sample], "labels": self._summaries[sample]}

    def token_counts(self) -> dict[str, Tensor]:
        """After cutting."""
        sides = {"tokens in a document": self._documents, "tokens in a summary": self._summaries}
        return {name: texts.starts.diff()[list(self.index)] for name, texts in sides.items()}

    def preview(self, i: int) -> Preview:
        sample, record = self[i], self.index[i]
        parts = [
            Part("document", sample["input_ids"], [False] * len(sample["input_ids"])),
            Part("summary", sample["labels"], [True] * len(sample["labels"])),
        ]
        sides = {"document": self._documents, "summary": self._summaries}
        cut = [name for name, texts in sides.items() if texts.cut[record]]
        return Preview(record + 1, parts, {"cut": " and ".join(cut)} if cut else {})

    def contents(self) -> Iterator[bytes]:
        """Each document as bytes: two that are equal are one sample."""
        return pieces(self._documents.tokens, self._documents.starts, self.index)

    def columns(self) -> Columns:
        return {
            "documents": self._documents.tokens,
            "document starts": self._documents.starts,
            "summaries": self._summaries.tokens,
            "summary starts": self._summaries.starts,
            "references": self._references,
            "index": torch.tensor(list(self.index), dtype=torch.int64),
        }

    @property
    def references(self) -> list[str]:
        """The whole text of each sample's summary."""
        return [self._references[i] for i in self.index]

    def first(self, count: int) -> SummaryDataset:
        """The first `count` samples alone."""
        return SummaryDataset(self._documents, self._summaries, self._references, self.index[:count])


def build_summaries(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int, progress: bool = True
) -> TokenizedData:
    """Load and tokenize the run's documents and summaries; the same on every rank, and at every world size.

    A document is cut at data.cutoff_len tokens, a summary at data.target_len, both with what the tokenizer puts
    around a text. validation_samples records, chosen by `seed`, are held out of train when `data.validation` is None.
    Raises UserError as `load_records` does.
    """
    for field, length in (("cutoff_len", data.cutoff_len), ("target_len", data.target_len)):
        if length > tokenizer.model_max_length:
            raise UserError(f"data.{field} = {length}: the model takes {tokenizer.model_max_length} tokens at most")
    train = _read(data, "train", tokenizer, progress)
    count = len(train[2])
    if data.validation is not None:
        validation = _read(data, "validation", tokenizer, progress)
        return TokenizedData(
            *_select(*train, range(count), data), *_select(*validation, range(len(validation[2])), data)
        )
    chosen = held_out(count, data.validation_samples, seed)
    rest = [i for i in range(count) if i not in chosen]
    return TokenizedData(*_select(*train, rest, data), *(_select(*train, sorted(chosen), data) if chosen else ()))


def _read(
    data: DataConfig, split: str, tokenizer: PreTrainedTokenizerFast, progress: bool
) -> tuple[_Texts, _Texts, list[str]]:
    """Documents, summaries, and the summaries' texts."""
    named, [document] = getattr(data, split), data.text_fields
    fields = {document: str, data.label_field: str}
    named_by = {document: "data.text_fields", data.label_field: "data.label_field"}
    rows, doubts = [], Doubts(tokenizer)
    for place, row in read_records([named] if isinstance(named, str) else named, fields, split, named_by=named_by):
        texts = [row[field] for field in fields]
        doubts.look(place, texts, empty=not all(map(str.strip, texts)))
        rows.append(row)
    say(f"data.{split}", doubts.packed(f"data.{split}", f'"{document}" or "{data.label_field}"'))
    references = [row[data.label_field] for row in rows]
    documents = [row[document] for row in rows]
    total = len(documents) + len(references)
    with console.progress(total, f"tokenizing data.{split}", " texts", delay=2.0, leave=False, shown=progress) as bar:
        return (
            _tokenize(tokenizer, "text", documents, data.cutoff_len, bar),
            _tokenize(tokenizer, "text_target", references, data.target_len, bar),
            references,
        )


def _tokenize(tokenizer: PreTrainedTokenizerFast, kind: str, texts: Sequence[str], length: int, bar: Any) -> _Texts:
    """`kind` is the tokenizer's own word for a model's input or output: some write them differently."""
    tokens, starts, cut = array("i"), [0], []
    for first in range(0, len(texts), CHUNK):
        chunk = texts[first : first + CHUNK]
        for encoding in tokenizer(**{kind: chunk}, truncation=True, max_length=length, verbose=False).encodings or []:
            tokens.extend(encoding.ids)
            starts.append(len(tokens))
            cut.append(bool(encoding.overflowing))
        bar.update(len(chunk))
    return _Texts(torch.frombuffer(tokens, dtype=torch.int32), torch.tensor(starts), cut)


def _select(
    documents: _Texts, summaries: _Texts, references: Sequence[str], samples: Sequence[int], data: DataConfig
) -> tuple[SummaryDataset, SummaryStats]:
    stats = SummaryStats(
        samples=len(samples),
        tokens=documents.count(samples),
        label_tokens=summaries.count(samples),
        cut_documents=sum(documents.cut[i] for i in samples),
        truncated=sum(summaries.cut[i] for i in samples),
        cutoff_len=data.cutoff_len,
        target_len=data.target_len,
        first_cut=numbers(i for i in samples if summaries.cut[i]),
    )
    return SummaryDataset(documents, summaries, references, samples), stats
