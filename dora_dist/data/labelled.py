"""Records of one or two texts and a label, for models that classify or rate: reading, tokenizing, padding."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dora_dist.data.collate import WithFiller
from dora_dist.data.columns import Columns
from dora_dist.data.dataset import CHUNK, IGNORED, TokenizedData, held_out, pieces
from dora_dist.data.doubts import Doubts, say
from dora_dist.data.preview import Figures, Part, Preview, numbers, share
from dora_dist.data.records import read_records
from dora_dist.data.sampler import FILLER
from dora_dist.data.stats import LabelledStats
from dora_dist.runtime import console
from dora_dist.runtime.console import warn
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dora_dist.config import DataConfig


_MOST_LABELS = 10  # that are named


class LabelledDataset(Dataset[dict[str, Any]]):
    """Some of the samples in flat arrays; item i is {"input_ids", "token_type_ids", "label"}."""

    def __init__(self, tokens: Tensor, segments: Tensor, starts: Tensor, labels: Tensor, index: Sequence[int]):
        """tokens, segments: (T,) int32; starts: (n + 1,) int64; labels: (n,) or (n, k) float64; index:
        which of n are here."""
        self.tokens, self.segments, self.starts, self.labels, self.index = tokens, segments, starts, labels, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = self.index[i]
        part = slice(self.starts[sample], self.starts[sample + 1])
        return {
            "input_ids": self.tokens[part].tolist(),
            "token_type_ids": self.segments[part].tolist(),
            "label": self.labels[sample].tolist(),
        }

    def token_counts(self) -> dict[str, Tensor]:
        """After cutting."""
        return {"tokens in a sample": self.starts.diff()[list(self.index)]}

    def preview(self, i: int) -> Preview:
        ids = self[i]["input_ids"]
        label = self.labels[self.index[i]].item()
        return Preview(self.index[i] + 1, [Part("", ids, [False] * len(ids))], {"label": f"{label:g} (learnt)"})

    def contents(self) -> Iterator[bytes]:
        """Each sample's texts as bytes: two that are equal are one sample."""
        return pieces(self.tokens, self.starts, self.index)

    def columns(self) -> Columns:
        return {
            "tokens": self.tokens,
            "segments": self.segments,
            "starts": self.starts,
            "labels": self.labels,
            "index": torch.tensor(list(self.index), dtype=torch.int64),
        }

    def first(self, count: int) -> LabelledDataset:
        """The first `count` samples alone."""
        return LabelledDataset(self.tokens, self.segments, self.starts, self.labels, self.index[:count])


def build_labelled(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, *, num_labels: int, seed: int, progress: bool = True
) -> TokenizedData:
    """Load and tokenize the run's labelled data; the same on every rank, and at every world size.

    A label is a whole number from 0 below `num_labels`, or any number where that is 1 (a rating). Two texts are
    joined as the tokenizer joins pairs; what exceeds data.cutoff_len is cut from the longer one.
    validation_samples records, chosen by `seed`, are held out of train when `data.validation` is None. Raises
    UserError as `load_records` does, and for a label that is none.
    """
    if data.cutoff_len > tokenizer.model_max_length:
        raise UserError(
            f"data.cutoff_len = {data.cutoff_len}: the model takes {tokenizer.model_max_length} tokens at most"
        )
    train = _read(data, "train", tokenizer, num_labels, progress)
    if data.validation is not None:
        validation = _read(data, "validation", tokenizer, num_labels, progress)
        everything = (range(len(store.labels)) for store in (train, validation))
        return TokenizedData(
            *_select(train, next(everything), data, num_labels),
            *_select(validation, next(everything), data, num_labels),
        )
    chosen = held_out(len(train.labels), data.validation_samples, seed)
    rest = [i for i in range(len(train.labels)) if i not in chosen]
    validating = _select(train, sorted(chosen), data, num_labels) if chosen else ()
    return TokenizedData(*_select(train, rest, data, num_labels), *validating)


@dataclass(frozen=True)
class _Store:
    tokens: Tensor
    segments: Tensor
    starts: Tensor
    labels: Tensor
    truncated: list[bool]


def _read(data: DataConfig, split: str, tokenizer: PreTrainedTokenizerFast, num_labels: int, progress: bool) -> _Store:
    named = getattr(data, split)
    sources = [named] if isinstance(named, str) else named
    fields = {**dict.fromkeys(data.text_fields, str), data.label_field: object}
    named_by = {**dict.fromkeys(data.text_fields, "data.text_fields"), data.label_field: "data.label_field"}
    rows = list(read_records(sources, fields, split, named_by=named_by))
    labels = [_label(place, data.label_field, row[data.label_field], num_labels) for place, row in rows]
    _warn_of_labels(f"data.{split}", data.label_field, labels, num_labels)
    doubts = Doubts(tokenizer)
    for place, row in rows:
        texts = [row[field] for field in data.text_fields]
        doubts.look(place, texts, empty=not any(map(str.strip, texts)))
    say(f"data.{split}", doubts.packed(f"data.{split}", "the text"))
    tokens, segments, starts, truncated = array("i"), array("i"), [0], []
    with console.progress(
        len(rows), f"tokenizing data.{split}", " samples", delay=2.0, leave=False, shown=progress
    ) as bar:
        for first in range(0, len(rows), CHUNK):
            chunk = [row for _, row in rows[first : first + CHUNK]]
            for encoding in _encode(tokenizer, chunk, data):
                tokens.extend(encoding.ids)
                segments.extend(encoding.type_ids)
                starts.append(len(tokens))
                truncated.append(bool(encoding.overflowing))
            bar.update(len(chunk))
    flat_tokens, flat_segments = (torch.frombuffer(flat, dtype=torch.int32) for flat in (tokens, segments))
    return _Store(
        flat_tokens, flat_segments, torch.tensor(starts), torch.tensor(labels, dtype=torch.float64), truncated
    )


def _encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]], data: DataConfig) -> list[Any]:
    texts = [[row[field] for row in rows] for field in data.text_fields]
    return tokenizer(*texts, truncation="longest_first", max_length=data.cutoff_len, verbose=False).encodings or []


def _label(place: str, field: str, value: Any, num_labels: int) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if num_labels == 1:
        if number and math.isfinite(value) and value != IGNORED:
            return float(value)
        raise UserError(
            f'{place}: "{field}" is {value!r}; with model.num_labels = 1 it must be a number (but not {IGNORED})'
        )
    if number and value in range(num_labels):
        return float(value)
    raise UserError(
        f'{place}: "{field}" is {value!r}; with model.num_labels = {num_labels} it must be a whole number from 0 to '
        f"{num_labels - 1} (a test split hides its labels)"
    )


def _warn_of_labels(field: str, name: str, labels: Sequence[float], num_labels: int) -> None:
    there = set(labels)
    if len(there) == 1 and len(labels) > 1:
        warn(f'{field}: "{name}" is {labels[0]:g} in all {len(labels):,} records; nothing tells labels apart there')
    elif num_labels > 1 and (never := [str(label) for label in range(num_labels) if label not in there]):
        shown = ", ".join([*never[:8], *["..."][: len(never) > 8]])
        warn(f'{field}: "{name}" is never {shown}; model.num_labels = {num_labels} counts labels from 0')


def _select(
    store: _Store, samples: Sequence[int], data: DataConfig, num_labels: int
) -> tuple[LabelledDataset, LabelledStats]:
    stats = LabelledStats(
        samples=len(samples),
        tokens=int(store.starts.diff()[list(samples)].sum()),
        truncated=sum(store.truncated[i] for i in samples),
        cutoff_len=data.cutoff_len,
        labels=_figures_of_labels(store.labels[list(samples)], num_labels),
        first_cut=numbers(i for i in samples if store.truncated[i]),
    )
    return LabelledDataset(store.tokens, store.segments, store.starts, store.labels, samples), stats


def _figures_of_labels(labels: Tensor, num_labels: int) -> Figures:
    if num_labels == 1:
        lowest, highest = labels.aminmax()
        return {"ratings": f"{lowest:g} to {highest:g}", "  mean": f"{labels.mean():.3g}"}
    found = Counter(labels.long().tolist())
    return {f"  label {label}": share(found[label], len(labels)) for label in range(min(num_labels, _MOST_LABELS))}


class WithLabelledFiller(WithFiller):
    """`WithFiller` of labelled samples: its label is IGNORED, or each of its `labels` is, where there are more."""

    def __init__(self, dataset: Any, pad_token_id: int, labels: int = 1):
        super().__init__(dataset, pad_token_id)
        self.label = IGNORED if labels == 1 else [IGNORED] * labels

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == FILLER:
            return {"input_ids": [self.pad_token_id], "token_type_ids": [0], "label": self.label}
        return self.dataset[i]


class LabelledCollator:
    """Pads labelled samples on the right to the longest of the batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rating: bool, pad_to_multiple_of: int = 1):
        """rating: labels are numbers (fp32) rather than classes (int64)."""
        self.pad_token_id, self.multiple = tokenizer.pad_token_id, pad_to_multiple_of
        self.segment_padding = tokenizer.pad_token_type_id
        self.segments = "token_type_ids" in tokenizer.model_input_names
        self.dtype = torch.float32 if rating else torch.int64

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask, and where the tokenizer has them token_type_ids: (samples, length) int64;
        labels (samples,) or (samples, k)."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        shape = (len(samples), -(-longest // self.multiple) * self.multiple)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.tensor([sample["label"] for sample in samples], dtype=self.dtype),
        }
        if self.segments:
            batch["token_type_ids"] = torch.full(shape, self.segment_padding)
        for row, sample in enumerate(samples):
            stop = len(sample["input_ids"])
            batch["input_ids"][row, :stop] = torch.tensor(sample["input_ids"])
            batch["attention_mask"][row, :stop] = 1
            if self.segments:
                batch["token_type_ids"][row, :stop] = torch.tensor(sample["token_type_ids"])
        return batch
