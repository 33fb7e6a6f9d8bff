"""Questions about a text whose answers are spans of it (SQuAD): reading, cutting into windows, tokenizing."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_dist.data.columns import Columns
from dora_dist.data.dataset import CHUNK, TokenizedData, held_out
from dora_dist.data.doubts import Doubts, say
from dora_dist.data.labelled import LabelledDataset
from dora_dist.data.preview import Part, Preview
from dora_dist.data.reading import shown
from dora_dist.data.records import read_records
from dora_dist.data.stats import SpanStats
from dora_dist.metrics.squad import Question, Window
from dora_dist.runtime import console
from dora_dist.runtime.console import warn
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dora_dist.config import DataConfig

FIELDS: dict[str, type] = {"question": str, "context": str, "answers": dict}


class SpanDataset(LabelledDataset):
    """Windows of questions' texts; a label is the answer's first and last token, (0, 0) where it is not in there."""

    questions: list[Question]
    windows: list[Window]

    def first(self, count: int) -> SpanDataset:
        """The first `count` questions alone."""
        windows = [window for window in self.windows if window.question < count]
        part = SpanDataset(self.tokens, self.segments, self.starts, self.labels, self.index[: len(windows)])
        part.questions, part.windows = self.questions[:count], windows
        return part

    def token_counts(self) -> dict[str, Tensor]:
        return {"tokens in a window": self.starts.diff()[list(self.index)]}

    def preview(self, i: int) -> Preview:
        sample, question = self[i], self.windows[i].question
        first, last = map(int, sample["label"])
        learnt = [first <= token <= last and last > 0 for token in range(len(sample["input_ids"]))]
        answers = self.questions[question].answers
        found = "marked" if last > 0 else "not in this window" if answers else "none"
        return Preview(question + 1, [Part("", sample["input_ids"], learnt)], {"answer": found})

    def columns(self) -> Columns:
        answers = (json.dumps(question.answers) for question in self.questions)
        places = (f"{window.question} {window.offsets}" for window in self.windows)
        contexts = (question.context for question in self.questions)
        return {**super().columns(), "contexts": contexts, "answers": answers, "windows": places}


def build_spans(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int, progress: bool = True
) -> TokenizedData:
    """Load and tokenize the run's questions; the same on every rank, and at every world size.

    A text that exceeds data.cutoff_len with its question is cut into windows that overlap by data.doc_stride tokens.
    Raises UserError as `load_records` does, and for an answer that is not in the text where it says.
    """
    if data.cutoff_len > tokenizer.model_max_length:
        raise UserError(
            f"data.cutoff_len = {data.cutoff_len}: the model takes {tokenizer.model_max_length} tokens at most"
        )
    train = _read(data, "train", tokenizer)
    if data.validation is not None:
        validation = _read(data, "validation", tokenizer)
    else:
        chosen = held_out(len(train), data.validation_samples, seed)
        validation = [train[i] for i in sorted(chosen)]
        train = [record for i, record in enumerate(train) if i not in chosen]
    validating = _windows(validation, data, tokenizer, "validation", progress) if validation else ()
    return TokenizedData(*_windows(train, data, tokenizer, "train", progress), *validating)


def _read(data: DataConfig, split: str, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    named, field = getattr(data, split), f"data.{split}"
    records, doubts, answered = [], Doubts(tokenizer), 0
    for place, row in read_records([named] if isinstance(named, str) else named, FIELDS, split):
        answered += bool(_check_answers(place, row))
        doubts.look(place, [row["question"], row["context"]], empty=not row["question"].strip())
        records.append(row)
    say(field, doubts.packed(field, '"question"'))
    if not answered:
        warn(f"{field}: none of its {len(records):,} questions has an answer (a test split hides them)")
    return records


def _check_answers(place: str, row: dict[str, Any]) -> list[str]:
    """The texts of a question's answers. Raises UserError unless each is in the context where it says."""
    texts, starts = (row["answers"].get(key) for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise UserError(f'{place}: "answers" must be {{"text": [...], "answer_start": [...]}}, lists of one length')
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text:
            raise UserError(f'{place}: "text" of "answers" holds {shown(text)}, and must hold words of "context"')
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise UserError(f'{place}: "answer_start" holds {shown(start)}, and must hold whole numbers from 0')
        if row["context"][start : start + len(text)] != text:
            at = row["context"].find(text)
            hint = f"it is at {at}" if at >= 0 else "it is nowhere in it"
            raise UserError(f'{place}: the answer {text!r} is not at character {start} of "context" ({hint})')
    return texts


def _windows(
    records: Sequence[dict[str, Any]],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    progress: bool,
) -> tuple[SpanDataset, SpanStats]:
    tokens, segments, starts, labels = array("i"), array("i"), [0], []
    windows = []
    bar = console.progress(
        len(records), f"tokenizing data.{split}", " questions", delay=2.0, leave=False, shown=progress
    )
    with bar:
        for first in range(0, len(records), CHUNK):
            chunk = records[first : first + CHUNK]
            for question, encoding in _encode(chunk, data, tokenizer):
                window = Window(first + question, _offsets(encoding))
                tokens.extend(encoding.ids)
                segments.extend(encoding.type_ids)
                starts.append(len(tokens))
                labels.append(_position(chunk[question]["answers"], window))
                windows.append(window)
            bar.update(len(chunk))
    flat_tokens, flat_segments = (torch.frombuffer(flat, dtype=torch.int32) for flat in (tokens, segments))
    dataset = SpanDataset(
        flat_tokens,
        flat_segments,
        torch.tensor(starts),
        torch.tensor(labels, dtype=torch.float64),
        range(len(windows)),
    )
    dataset.questions = [Question(row["context"], tuple(row["answers"]["text"])) for row in records]
    dataset.windows = windows
    stats = SpanStats(samples=len(windows), questions=len(records), tokens=len(tokens), cutoff_len=data.cutoff_len)
    return dataset, stats


def _encode(
    rows: Sequence[dict[str, Any]], data: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[int, Any]]:
    """Each window's question (its place in `rows`) and encoding."""
    encoded = tokenizer(
        [row["question"].strip() for row in rows],
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=data.cutoff_len,
        stride=data.doc_stride,
        return_overflowing_tokens=True,
        verbose=False,
    )
    yield from zip(encoded["overflow_to_sample_mapping"], encoded.encodings or [], strict=True)


def _offsets(encoding: Any) -> list[tuple[int, int] | None]:
    pairs = zip(encoding.sequence_ids, encoding.offsets, strict=True)
    return [tuple(offset) if sequence == 1 else None for sequence, offset in pairs]


def _position(answers: dict[str, Any], window: Window) -> tuple[int, int]:
    """The tokens that hold the first answer; (0, 0) if there is none, or it is not all in the window."""
    if not answers["text"]:
        return 0, 0
    start = answers["answer_start"][0]
    stop = start + len(answers["text"][0])
    inside = [i for i, o in enumerate(window.offsets) if o is not None and o[1] > start and o[0] < stop and o[1] > o[0]]
    if not inside:
        return 0, 0
    first, last = window.offsets[inside[0]], window.offsets[inside[-1]]
    assert first is not None and last is not None
    return (inside[0], inside[-1]) if first[0] <= start and last[1] >= stop else (0, 0)
