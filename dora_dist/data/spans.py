"""Questions about a text whose answers are spans of it (SQuAD); long texts are cut into windows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_dist.data.columns import Columns, Table, row_of, taken
from dora_dist.data.doubts import Doubts
from dora_dist.data.files import shown
from dora_dist.data.labelled import pair
from dora_dist.data.preview import Part, Preview
from dora_dist.data.reader import Reader, check_fits
from dora_dist.data.records import Record
from dora_dist.data.stats import SpanStats
from dora_dist.data.strings import unpack
from dora_dist.metrics.squad import Question, Window
from dora_dist.runtime.errors import UserError

_OUTSIDE = -1  # where a token is not of the text


@dataclass(frozen=True)
class Asked:
    """What spans are judged by: the windows that a model sees, and the questions that they are of."""

    questions: list[Question]
    windows: list[Window]


class SpanReader(Reader):
    """A sample is a window, {"input_ids", "token_type_ids", "label"}: the answer's first and last token.

    The label is (0, 0) where the answer is not in the window. A text that exceeds data.cutoff_len with its question is
    cut into windows that overlap by data.doc_stride tokens.
    """

    counted = "questions"
    follows_from = ("format", "cutoff_len", "doc_stride")
    fields: ClassVar[Mapping[str, type]] = {"question": str, "context": str, "answers": dict}
    learnt = '"question"'

    def check(self) -> None:
        check_fits(self.tokenizer, cutoff_len=self.data.longest_text)

    def encode(self, records: Sequence[tuple[str, Record]], into: Columns, doubts: Doubts) -> None:
        for place, record in records:
            answers = _checked_answers(place, record)
            doubts.look(place, [record["question"], record["context"]], empty=not record["question"].strip())
            into.strings("context starts", contexts=[record["context"]])
            into.strings("answer starts", answers=[json.dumps(answers)])
        encoded = self.tokenizer(
            [record["question"].strip() for _, record in records],
            [record["context"] for _, record in records],
            truncation="only_second",
            max_length=self.data.longest_text,
            stride=self.data.doc_stride,
            return_overflowing_tokens=True,
            verbose=False,
        )
        for question, encoding in zip(encoded["overflow_to_sample_mapping"], encoded.encodings or [], strict=True):
            pairs = zip(encoding.sequence_ids, encoding.offsets, strict=True)
            offsets = [tuple(offset) if sequence == 1 else (_OUTSIDE, _OUTSIDE) for sequence, offset in pairs]
            begins, ends = zip(*offsets, strict=True)
            into.ragged("starts", tokens=encoding.ids, segments=encoding.type_ids, begins=begins, ends=ends)
            into.values(questions=into.records + question)
            into.values(labels=tuple(map(float, _position(records[question][1]["answers"], offsets))))

    def remarks(self, table: Table) -> list[str]:
        answers = unpack(table["answers"], table["answer starts"])
        if any(json.loads(text) for text in answers):
            return []
        return [f"none of its {len(answers):,} questions has an answer (a test split hides them)"]

    def select(self, table: Table, index: Tensor, where: str) -> tuple[Tensor, SpanStats]:
        return index, SpanStats(
            samples=len(index),
            questions=len(table["questions"][index].unique()),
            tokens=int(self.lengths(table)[index].sum()),
            cutoff_len=self.data.longest_text,
        )

    def item(self, table: Table, row: int) -> dict[str, Any]:
        return pair(table, row)

    def preview(self, table: Table, row: int) -> Preview:
        sample, question = self.item(table, row), int(table["questions"][row])
        first, last = map(int, sample["label"])
        learnt = [first <= token <= last and last > 0 for token in range(len(sample["input_ids"]))]
        [answers] = unpack(table["answers"], table["answer starts"], question, question + 1)
        found = "marked" if last > 0 else "not in this window" if json.loads(answers) else "none"
        return Preview(question + 1, [Part("", sample["input_ids"], learnt)], {"answer": found})

    def record_numbers(self, table: Table) -> Tensor:
        return table["questions"]

    def token_counts(self, table: Table) -> dict[str, Tensor]:
        return {"tokens in a window": self.lengths(table)}

    def references(self, table: Table, index: Tensor) -> Asked:
        """Questions are counted from 0 among those that the data set has."""
        numbers, windows = table["questions"][index].unique_consecutive(return_inverse=True)
        contexts, answers = (unpack(table[f"{name}s"], table[f"{name} starts"]) for name in ("context", "answer"))
        questions = [Question(contexts[i], tuple(json.loads(answers[i]))) for i in numbers.tolist()]
        return Asked(questions, [Window(q, _offsets(table, i)) for q, i in zip(windows.tolist(), index, strict=True)])

    def columns(self, table: Table, index: Tensor) -> dict[str, Tensor | Iterable[str]]:
        """As checkpoints know them: of a data set's own windows alone, and with what metrics need as texts."""
        tokens, starts = taken(table["tokens"], table["starts"], index)
        segments, _ = taken(table["segments"], table["starts"], index)
        asked = self.references(table, index)
        return {
            "tokens": tokens,
            "segments": segments,
            "starts": starts,
            "labels": table["labels"][index],
            "index": torch.arange(len(index)),
            "contexts": (question.context for question in asked.questions),
            "answers": (json.dumps(question.answers) for question in asked.questions),
            "windows": (f"{window.question} {window.offsets}" for window in asked.windows),
        }


def _offsets(table: Table, row: Any) -> list[tuple[int, int] | None]:
    pairs = zip(row_of(table, row, "begins").tolist(), row_of(table, row, "ends").tolist(), strict=True)
    return [None if begin == _OUTSIDE else (begin, end) for begin, end in pairs]


def _checked_answers(place: str, record: Record) -> list[str]:
    """The texts of a question's answers. Raises UserError unless each is in the context where it says."""
    texts, starts = (record["answers"].get(key) for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise UserError(f'{place}: "answers" must be {{"text": [...], "answer_start": [...]}}, lists of one length')
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text:
            raise UserError(f'{place}: "text" of "answers" holds {shown(text)}, and must hold words of "context"')
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise UserError(f'{place}: "answer_start" holds {shown(start)}, and must hold whole numbers from 0')
        if record["context"][start : start + len(text)] != text:
            at = record["context"].find(text)
            hint = f"it is at {at}" if at >= 0 else "it is nowhere in it"
            raise UserError(f'{place}: the answer {text!r} is not at character {start} of "context" ({hint})')
    return texts


def _position(answers: dict[str, Any], offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The tokens that hold the first answer; (0, 0) if there is none, or it is not all in the window."""
    if not answers["text"]:
        return 0, 0
    start = answers["answer_start"][0]
    stop = start + len(answers["text"][0])
    inside = [i for i, (begin, end) in enumerate(offsets) if end > start and begin < stop and end > begin]
    if not inside:
        return 0, 0
    first, last = inside[0], inside[-1]
    return (first, last) if offsets[first][0] <= start and offsets[last][1] >= stop else (0, 0)
