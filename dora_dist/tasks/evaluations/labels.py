"""Answers out of a few, by a language model: `score_task`, one task and a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dora_dist.data.formats import Rendered, candidate, generation_prompt
from dora_dist.data.records import Record
from dora_dist.runtime import console
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.answers import ANSWERED, CHAT, PAPER, exchange, reference
from dora_dist.tasks.evaluations.base import check_settings
from dora_dist.tasks.evaluations.commonsense import AnswerLabels, candidates, gold_label, paper_task
from dora_dist.tasks.evaluations.generation import generate_texts
from dora_dist.tasks.evaluations.likelihood import candidate_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class TaskScore:
    """How a model did on one task; predictions are in the records' order, None where no answer was found."""

    correct: int
    total: int
    predictions: list[str | None]

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[Record],
    task: str,
    *,
    mode: str = "generate",
    format: str = "instruction",
    batch_size: int = 8,
    num_beams: int = 4,
    max_new_tokens: int = 32,
    normalise: str = "sum",
    progress: bool = True,
) -> TaskScore:
    """Accuracy of a model on the records of a task; the model is left in the mode it came in.

    "generate": as Liu et al. (section 4.1) evaluate their eight tasks. The model continues the evaluation prompt; the
    first label after the last "### Response:" must equal "answer"; text with no label counts as wrong.
    "likelihood": the most probable of the record's candidates (`commonsense.candidates`) after the TRAINING prompt of
    `format` ("instruction", "alpaca", "completion", or "messages": in the place of the last assistant turn);
    `normalise` "sum" compares the probability of whole answers, "mean" that of their average token.

    Raises UserError for an unknown mode or task, and for a record that does not fit, which it names by number.
    """
    check_settings(mode, normalise, batch_size)
    check_format(format)
    if mode == "loss" or (mode == "generate" and format != PAPER):
        raise UserError(f"--mode {mode} with --format {format}: there are no labels to read; see `score_answers`")
    prepared = [
        right_answer(f"record {i}", task, record, mode, format=format) for i, record in enumerate(records, start=1)
    ]
    choices, gold = [texts for texts, _ in prepared], [texts[right] for texts, right in prepared]
    if not records:
        raise UserError(f'task "{task}" has no records to score')
    was_training = model.training
    model.eval()
    predictions: list[str | None]
    try:
        with console.progress(len(records), f"{task} ({mode})", " questions", shown=progress) as bar:
            work: dict[str, Any] = {"batch_size": batch_size, "advance": bar.update}
            if mode == "generate":
                work |= {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
                predictions = _labels(model, tokenizer, records, paper_task(task), **work)
            else:
                work |= {"format": format, "mean": normalise == "mean"}
                predictions = _likeliest(model, tokenizer, records, choices, **work)
    finally:
        model.train(was_training)
    correct = sum(p == g for p, g in zip(predictions, gold, strict=True))
    return TaskScore(correct, len(records), predictions)


def _labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[Record],
    task: AnswerLabels,
    **work: Any,
) -> list[str | None]:
    """The first label in what the model writes to each record."""
    prompts = [generation_prompt(record) for record in records]
    outputs = generate_texts(model, tokenizer, prompts, **work)
    return [task.find(prompt + text) for prompt, text in zip(prompts, outputs, strict=True)]


def _likeliest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[Record],
    choices: Sequence[Sequence[str]],
    *,
    format: str,
    **work: Any,
) -> list[str | None]:
    """The most probable of each record's choices."""
    questions = [
        [with_candidate(record, format, text, tokenizer) for text in texts]
        for record, texts in zip(records, choices, strict=True)
    ]
    scores = candidate_log_probs(model, tokenizer, questions, **work)
    return [texts[max(range(len(row)), key=row.__getitem__)] for texts, row in zip(choices, scores, strict=True)]


def right_answer(place: str, task: str, record: Record, mode: str, *, format: str) -> tuple[list[str], int]:
    """The candidates and which of them is right; for generation, the right label alone.

    Raises UserError, naming the place, for a record that does not fit.
    """
    try:
        if format == PAPER:
            generation_prompt(record)  # refuses what no prompt of this format can hold
        if mode == "generate":
            return [gold_label(paper_task(task), record)], 0
        return candidates(task, {**record, "output": reference(record, format)} if format == CHAT else record)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def texts_of(
    task: str, place: str, record: Record, *, mode: str, format: str, tokenizer: PreTrainedTokenizerFast
) -> list[Rendered]:
    """What the model will be given of a record. Raises UserError, naming the place, for one that does not fit."""
    texts, _ = right_answer(place, task, record, mode, format=format)
    if mode == "generate":
        return [Rendered(generation_prompt(record), ())]
    try:
        return [with_candidate(record, format, text, tokenizer) for text in texts]
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def with_candidate(record: Record, format: str, text: str, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """The record as training would see it, had it this answer; how a chat's turn ends is not part of the answer."""
    if format == CHAT:
        return exchange(record, format, text, tokenizer).rendered(with_end=False)
    return candidate(record, format, text, tokenizer)


def check_format(format: str) -> None:
    """Raise UserError for a format that is not a language model's."""
    if format not in ANSWERED:
        raise UserError(f"--format {format}: is not for a language model; give one of {', '.join(ANSWERED)}")
