"""Language models on files of records: labels read from what they write, the likeliest candidates, or free answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dora_dist.config.mixture import checked, formats_of
from dora_dist.data.formats import FORMATS, asked_as
from dora_dist.data.records import Record, read_records
from dora_dist.runtime import console
from dora_dist.runtime.console import note
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.answers import (
    ANSWERED,
    PAPER,
    Exchange,
    exchange,
    gold_answers,
    reference,
    score_answers,
)
from dora_dist.tasks.evaluations.base import Asked, Evaluation, Settings, Subject
from dora_dist.tasks.evaluations.labels import check_format, right_answer, score_task, texts_of
from dora_dist.tasks.evaluations.lengths import check_lengths, positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONGEST = 512
"""Most tokens of a free answer, unless told otherwise."""
KNOWN = ("mode", "format", "normalise", "num_beams", "max_new_tokens")
Located = Sequence[tuple[str, Record]]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How records are asked. max_new_tokens: None: as the references need, at most LONGEST."""

    mode: str
    format: str
    batch_size: int
    normalise: str
    num_beams: int
    max_new_tokens: int | None
    prepare: Callable[[Record], Record] | None = None

    @property
    def free(self) -> bool:
        """Whether answers are free texts, and not one of a few."""
        return self.mode == "loss" or (self.mode == "generate" and self.format != PAPER)

    @property
    def settings(self) -> dict[str, Any]:
        """What matters of it, for the result."""
        searching = {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}
        return {
            "batch_size": self.batch_size,
            **({"format": self.format} if (self.mode, self.format) != ("generate", PAPER) else {}),
            **({"normalise": self.normalise} if self.mode == "likelihood" else {}),
            **(searching if self.mode == "generate" else {}),
        }


class LanguageEvaluation(Evaluation):
    """The record format is by default that of the run in which the model was trained, else the paper's; dtype bf16."""

    def __init__(self, task: str, subject: Subject, settings: Settings) -> None:
        settings.refuse_other_modes()
        settings.refuse_all_but(KNOWN, task)
        format, prepare = (settings.format, None) if settings.format else _format_of(subject.run)
        self.asking = replace(_asking(settings, format), prepare=prepare)
        check_format(self.asking.format)
        self._subject, self._limit = subject, settings.limit
        self.dtype = settings.dtype or "bf16"
        self.facts = {"mode": self.asking.mode}
        self.settings = {**self.asking.settings, "dtype": self.dtype, "limit": settings.limit}

    @cached_property
    def _positions(self) -> int | None:
        return positions_of(self._subject.base)

    def read(self, name: str, file: str) -> Asked:
        asking = self.asking
        located = _read(name, file, asking, self._limit)
        kind = FreeAnswers if asking.free else Choices
        tokenizer = self._subject.tokenizer
        return kind(task=name, located=located, asking=asking, positions=self._positions, tokenizer=tokenizer)

    def loaded(self, model: Any) -> None:
        if self.asking.mode == "generate" and model.generation_config.do_sample:
            note("the model's generation_config.json asks for sampling; answers are searched for without it")

    def summary(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The average of the accuracies, if each file has one."""
        accuracies = [row["accuracy"] for row in rows.values() if "accuracy" in row]
        return {"average": sum(accuracies) / len(rows)} if len(accuracies) == len(rows) else {}


def _asking(settings: Settings, format: str) -> Asking:
    labels = Asking(
        mode=settings.mode or "generate",
        format=format,
        batch_size=settings.batch_size,
        normalise=settings.normalise or "sum",
        num_beams=settings.num_beams or 4,
        max_new_tokens=settings.max_new_tokens or 32,
    )
    free = replace(labels, num_beams=settings.num_beams or 1, max_new_tokens=settings.max_new_tokens)
    return free if labels.free else labels


def _format_of(run: Mapping[str, Any]) -> tuple[str, Callable[[Record], Record] | None]:
    """The record format of a run's data, the paper's where it was trained in none, and what makes records of it."""
    data = {"format": PAPER, **run.get("data", {})}
    format, prepare = asked_as(data)
    if format != PAPER:
        said = " and ".join(sorted(formats_of(checked(data.get("train")), data["format"])))
        note(f'records are read as the run\'s data.format says, "{said}"; --format gives another')
    return str(format), prepare


def _read(task: str, file: str, asking: Asking, limit: int | None) -> Located:
    """The task's records with their places. Those that are compared with their choices need not have an answer."""
    optional = None if asking.free else ANSWERED[asking.format]
    needed = {field: kind for field, kind in FORMATS[asking.format].fields.items() if field != optional}
    located = list(read_records([file], needed, prepare=asking.prepare))[:limit]
    for place, record in located if not asking.free else ():
        right_answer(place, task, record, asking.mode, format=asking.format)
    return located


@dataclass(kw_only=True)
class AskedOfText(Asked):
    """Records of a task with their places. Raises UserError, naming the record, for what does not fit."""

    task: str
    located: Located
    asking: Asking
    positions: int | None
    tokenizer: PreTrainedTokenizerFast

    @abstractmethod
    def __post_init__(self) -> None:
        """Check each record, and whether it fits into the model's positions."""


class Choices(AskedOfText):
    """Records whose answers are one of a few."""

    def __post_init__(self) -> None:
        asking, lengths = self.asking, []
        for place, record in self.located:
            how: dict[str, Any] = {"mode": asking.mode, "format": asking.format, "tokenizer": self.tokenizer}
            longest = max(texts_of(self.task, place, record, **how), key=lambda each: len(each.text))
            lengths.append(_length(self.tokenizer, longest.text, longest.complete))
        new = asking.max_new_tokens if asking.mode == "generate" else None
        check_lengths([place for place, _ in self.located], lengths, self.positions, new_tokens=new or 0)

    def score(self, model: Any, *, progress: bool) -> dict[str, Any]:
        how: dict[str, Any] = {"mode": self.asking.mode, "progress": progress, **self.asking.settings}
        score = score_task(model, self.tokenizer, [record for _, record in self.located], self.task, **how)
        return {
            "accuracy": score.accuracy,
            "correct": score.correct,
            "total": score.total,
            "without_answer": score.predictions.count(None),
        }


class FreeAnswers(AskedOfText):
    """Records whose answers are texts of any kind."""

    def __post_init__(self) -> None:
        asking, tokenizer = self.asking, self.tokenizer
        self._places = [place for place, _ in self.located]
        self._exchanges = [_exchange(place, record, asking.format, tokenizer) for place, record in self.located]
        self._gold = [each.words for each in self._exchanges]
        prompts = [_length(tokenizer, each.prompt, each.complete) for each in self._exchanges]
        wholes = [_length(tokenizer, each.text, each.complete) + 1 for each in self._exchanges]
        check_lengths(self._places, wholes, self.positions)
        longest = max(whole - prompt for whole, prompt in zip(wholes, prompts, strict=True))
        self._new = asking.max_new_tokens or min(longest + 1, LONGEST)
        if asking.mode == "generate":
            records = [record for _, record in self.located]
            self._gold = gold_answers(self.task, self._places, records, self._exchanges)
            check_lengths(self._places, prompts, self.positions, new_tokens=self._new)

    def score(self, model: Any, *, progress: bool) -> dict[str, Any]:
        asking, total = self.asking, len(self._exchanges)
        with console.progress(total, f"{self.task} ({asking.mode})", " records", shown=progress) as bar:
            scores = score_answers(
                model,
                self.tokenizer,
                self._exchanges,
                gold=self._gold,
                task=self.task,
                generate=asking.mode == "generate",
                batch_size=asking.batch_size,
                num_beams=asking.num_beams,
                max_new_tokens=self._new,
                advance=bar.update,
            )
        said = zip(self._places, scores.texts, self._gold, strict=False)
        predictions = [{"record": place, "answer": text, "reference": gold} for place, text, gold in said]
        searched = {"max_new_tokens": self._new, "predictions": predictions} if asking.mode == "generate" else {}
        return {**scores.metrics, "total": total, **searched}


def _exchange(place: str, record: Record, format: str, tokenizer: PreTrainedTokenizerFast) -> Exchange:
    try:
        return exchange(record, format, reference(record, format), tokenizer)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _length(tokenizer: PreTrainedTokenizerFast, text: str, complete: bool) -> int:
    return len(tokenizer(text, add_special_tokens=not complete, verbose=False).input_ids)
