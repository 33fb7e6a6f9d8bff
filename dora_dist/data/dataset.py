"""Records to token ids and labels, held in two flat arrays; truncation and dropped samples are counted."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dora_dist.data.cache import cached
from dora_dist.data.columns import Columns, token_ids
from dora_dist.data.doubts import Doubts, say
from dora_dist.data.formats import FORMATS, Rendered, check_template, texts_of
from dora_dist.data.preview import Part, Preview, numbers
from dora_dist.data.records import ANSWERS, FIELDS, Record, check_characters, read_records
from dora_dist.data.stats import TextStats
from dora_dist.runtime import console
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dora_dist.config import DataConfig

IGNORED = -100  # a label that carries no loss, as in torch.nn.CrossEntropyLoss
CHUNK = 1000  # samples tokenized at once: enough to keep the tokenizer's threads busy


class TokenizedDataset(Dataset[dict[str, list[int]]]):
    """Some of the samples in flat arrays; item i is {"input_ids", "labels"}, two lists of one length."""

    def __init__(self, store: _Store, index: Sequence[int]):
        """index: which of the store's samples are here."""
        self.tokens, self.labels, self.starts, self._lengths = store.tokens, store.labels, store.starts, store.lengths
        self.index = torch.tensor(index, dtype=torch.int64)  # loader processes would copy a list, page by page

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        start, stop = self.starts[self.index[i]], self.starts[self.index[i] + 1]
        return {"input_ids": self.tokens[start:stop].tolist(), "labels": self.labels[start:stop].tolist()}

    def token_counts(self) -> dict[str, Tensor]:
        return {"tokens in a record": self._lengths[self.index]}

    def preview(self, i: int) -> Preview:
        sample, record = self[i], int(self.index[i])
        learnt = [label != IGNORED for label in sample["labels"]]
        learnt[0] = False  # nothing predicts it
        whole = int(self._lengths[record])
        cut = {"cut": f"after {len(learnt):,} of {whole:,} tokens"} if whole > len(learnt) else {}
        return Preview(record + 1, [Part("", sample["input_ids"], learnt)], cut)

    def contents(self) -> Iterator[bytes]:
        """Each sample as bytes: two that are equal are one sample."""
        return pieces(self.tokens, self.starts, self.index.tolist())

    def columns(self) -> Columns:
        return {"tokens": self.tokens, "labels": self.labels, "starts": self.starts, "index": self.index}


@dataclass(frozen=True)
class TokenizedData:
    """What a run trains and validates on (data sets with columns), and what became of the records."""

    train: Any
    train_stats: Any
    validation: Any = None
    validation_stats: Any = None

    def token_ids(self) -> list[Tensor]:
        """All token ids of both sets, flat."""
        sets = [rows for rows in (self.train, self.validation) if rows is not None]
        return [ids for rows in sets for ids in token_ids(rows.columns())]


def build_dataset(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int, progress: bool = True
) -> TokenizedData:
    """Load, render and tokenize the run's data; the same on every rank, and at every world size.

    loss_on "all": every token is a label; "answer": only the output (the assistant's turns, for messages) and
    the end-of-sequence token. cutoff_len counts all tokens, special ones included; a sample that is cut loses
    its end and so its end-of-sequence token. validation_samples records, chosen by `seed`, are held out of
    train when `data.validation` is None. Raises UserError as `load_records` does, and when nothing is left to
    train on.
    """
    if data.format == "messages":
        check_template(tokenizer)
    train_sources = [data.train] if isinstance(data.train, str) else data.train
    store = _tokenize(train_sources, "data.train", data, tokenizer, progress)
    if data.validation is not None:
        sources = [data.validation] if isinstance(data.validation, str) else data.validation
        validating = _tokenize(sources, "data.validation", data, tokenizer, progress)
        validation = _select(validating, range(len(validating.lengths)), "data.validation", data.cutoff_len)
        train = _select(store, range(len(store.lengths)), "data.train", data.cutoff_len)
        return TokenizedData(*train, *validation)
    chosen = held_out(len(store.lengths), data.validation_samples, seed)
    rest = [i for i in range(len(store.lengths)) if i not in chosen]
    train = _select(store, rest, "data.train", data.cutoff_len)
    if not chosen:
        return TokenizedData(*train)
    return TokenizedData(*train, *_select(store, sorted(chosen), "the validation samples", data.cutoff_len))


def encode(tokenizer: PreTrainedTokenizerFast, samples: Sequence[Rendered]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each sample and whether each token is answer; training and evaluation both count by this.

    Prompt and answer are tokenized as one text, so a token may straddle their border: it is answer, because
    predicting it takes knowing the answer's first characters.
    """
    complete = samples[0].complete
    encoded = tokenizer(
        [sample.text for sample in samples],
        add_special_tokens=not complete,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # its warning about long samples: they are cut and counted by us
    )
    result = []
    for sample, ids, offsets in zip(samples, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        answer = [False] * len(ids)
        for start, stop in sample.answers:
            for i, (first, last) in enumerate(offsets):
                if last > start and first < stop:
                    answer[i] = True
        if not complete:
            if not ids or ids[-1] != tokenizer.eos_token_id:  # some tokenizers put one there themselves
                ids, answer = [*ids, tokenizer.eos_token_id], [*answer, True]
            answer[-1] = True
        result.append((ids, answer))
    return result


@dataclass(frozen=True)
class _Store:
    """All records of some sources: sample i is tokens[starts[i]:starts[i + 1]]."""

    tokens: Tensor
    labels: Tensor
    starts: Tensor
    lengths: Tensor  # before what exceeds the cutoff is cut
    doubts: Tensor


def _tokenize(
    sources: Sequence[str],
    field: str,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    progress: bool,
) -> _Store:
    """The records of `sources` as token ids; from the cache where they are in it."""

    def make() -> dict[str, Tensor]:
        return vars(_tokenize_anew(sources, field, data, tokenizer, progress))

    settings = {name: getattr(data, name) for name in ("format", "loss_on", "cutoff_len")}
    settings["sources"] = sources  # doubts name them
    store = _Store(**cached(data.cache, sources, tokenizer, settings, make))
    say(field, store.doubts)
    return store


def _tokenize_anew(
    sources: Sequence[str],
    field: str,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    progress: bool,
) -> _Store:
    rows = list(read_records(sources, FIELDS[data.format], field.removeprefix("data.")))
    tokens, labels, starts, lengths = array("i"), array("i"), [0], []
    everywhere, doubts = data.loss_on == "all", Doubts(tokenizer)
    bar = console.progress(len(rows), f"tokenizing {field}", " samples", delay=2.0, leave=False, shown=progress)
    with bar:
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            samples = [_render(place, row, data, tokenizer) for place, row in chunk]
            for place, row in chunk:
                asked, answers = texts_of(row, data.format)
                doubts.look(place, [*asked, *answers], empty=bool(answers) and not any(map(str.strip, answers)))
            for ids, answer in encode(tokenizer, samples):
                lengths.append(len(ids))
                ids = ids[: data.cutoff_len]
                tokens.extend(ids)
                labels.extend(t if everywhere or a else IGNORED for t, a in zip(ids, answer, strict=False))
                starts.append(len(tokens))
            bar.update(len(chunk))
    odd = doubts.packed(field, ANSWERS[data.format], may_be_empty=everywhere and data.format == "completion")
    flat_tokens, flat_labels = (torch.frombuffer(flat, dtype=torch.int32) for flat in (tokens, labels))
    return _Store(flat_tokens, flat_labels, torch.tensor(starts), torch.tensor(lengths), odd)


def _render(place: str, row: Record, data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    try:
        rendered = FORMATS[data.format](row, tokenizer, data.loss_on == "answer")
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    check_characters(place, rendered.text)
    return rendered


def held_out(records: int, wanted: int, seed: int) -> set[int]:
    """Which of `records` are held out for validation. Raises UserError if none would be left."""
    if wanted >= records:
        raise UserError(
            f"data.validation_samples is {wanted} but data.train holds {records} records; "
            "hold out fewer, or name a file in data.validation"
        )
    return set(torch.randperm(records, generator=torch.Generator().manual_seed(seed))[:wanted].tolist())


def pieces(tokens: Tensor, starts: Tensor, samples: Sequence[int]) -> Iterator[bytes]:
    """The bytes of tokens[starts[i]:starts[i + 1]] for each sample i."""
    bounds = starts.tolist()
    return (tokens[bounds[i] : bounds[i + 1]].numpy().tobytes() for i in samples)


def counts_between(flags: Tensor, starts: Tensor) -> Tensor:
    """(n,) int64: how many of flags[starts[i]:starts[i + 1]] are true, for starts (n + 1,)."""
    before = torch.cat([torch.zeros(1, dtype=torch.int64), flags.cumsum(0)])
    return before[starts[1:]] - before[starts[:-1]]


def _select(store: _Store, samples: Sequence[int], field: str, cutoff_len: int) -> tuple[TokenizedDataset, TextStats]:
    """Those of `samples` that have a label to learn from, and what the selection did."""
    labelled = store.labels != IGNORED
    labelled[store.starts[:-1]] = False  # the first token of a sample is never predicted
    counts = counts_between(labelled, store.starts)
    kept = [i for i in samples if counts[i] > 0]
    if not kept:
        shortest = int(store.lengths[list(samples)].min())
        raise UserError(
            f"none of the {len(samples)} samples of {field} has a token to learn from within "
            f"data.cutoff_len = {cutoff_len} (the shortest has {shortest} tokens); raise it, "
            "or look at the answers in the data"
        )
    lengths = store.starts.diff()
    stats = TextStats(
        samples=len(kept),
        tokens=int(lengths[kept].sum()),
        label_tokens=int(counts[kept].sum()),
        truncated=int((store.lengths[list(samples)] > cutoff_len).sum()),
        without_labels=len(samples) - len(kept),
        cutoff_len=cutoff_len,
        first_cut=numbers(i for i in samples if store.lengths[i] > cutoff_len),
        first_left_out=numbers(i for i in samples if counts[i] == 0),
    )
    return TokenizedDataset(store, kept), stats
