"""Language models: accuracy on files of records; `score_task`: one task, a model in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.data.formats import ANSWER_FIELDS, candidate, generation_prompt
from dora_dist.data.records import FIELDS, Record, read_records
from dora_dist.errors import UserError
from dora_dist.evaluation.tasks import candidates, gold_label, paper_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MODES = ("generate", "likelihood")


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

    "generate": the paper's way, for its eight tasks. The model continues the evaluation prompt; the first
    label after the last "### Response:" must equal "answer"; text with no label counts as wrong.
    "likelihood": the most probable of the record's candidates (`tasks.candidates`) after the TRAINING prompt of
    `format` ("instruction", "alpaca" or "completion");
    `normalise` "sum" compares the probability of whole answers, "mean" that of their average token.

    Raises UserError for an unknown mode or task, and for a record that does not fit, which it names by
    number.
    """
    check_settings(mode, normalise, batch_size)
    _check_format(mode, format)
    prepared = [_prepared(f"record {i}", task, record, mode, format) for i, record in enumerate(records, start=1)]
    choices, gold = [texts for texts, _ in prepared], [texts[right] for texts, right in prepared]
    if not records:
        raise UserError(f'task "{task}" has no records to score')

    from tqdm import tqdm

    from dora_dist.evaluation.generation import generate_texts
    from dora_dist.evaluation.likelihood import candidate_log_probs

    bar = tqdm(total=len(records), desc=f"{task} ({mode})", unit=" questions", disable=not progress)
    was_training = model.training
    model.eval()
    predictions: list[str | None]
    try:
        with bar:
            work: dict[str, Any] = {"batch_size": batch_size, "advance": bar.update}
            if mode == "generate":
                work |= {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
                outputs = generate_texts(model, tokenizer, records, **work)
                predictions = [paper_task(task).find(text) for text in outputs]
            else:
                questions = [
                    [candidate(record, format, text, tokenizer) for text in texts]
                    for record, texts in zip(records, choices, strict=True)
                ]
                mean = normalise == "mean"
                scores = candidate_log_probs(model, tokenizer, questions, mean=mean, **work)
                predictions = [texts[_argmax(row)] for texts, row in zip(choices, scores, strict=True)]
    finally:
        model.train(was_training)
    correct = sum(p == g for p, g in zip(predictions, gold, strict=True))
    return TaskScore(correct, len(records), predictions)


def evaluate_language_model(
    model_path: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    mode: str = "generate",
    format: str = "instruction",
    normalise: str = "sum",
    batch_size: int = 8,
    num_beams: int = 4,
    max_new_tokens: int = 32,
    limit: int | None = None,
    dtype: str = "bf16",
    progress: bool = True,
) -> dict[str, Any]:
    """The result of `evaluation.evaluate` for a language model; its files are checked before it is loaded."""
    from dora_dist.models.inference import load_for_inference

    _check_format(mode, format)
    records = {name: _read(name, str(file), mode, format, limit) for name, file in tasks.items()}
    started = time.perf_counter()
    model, tokenizer = load_for_inference(str(model_path), dtype)
    loaded = time.perf_counter()
    settings: dict[str, Any] = {"batch_size": batch_size}
    if mode == "generate":
        settings |= {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    else:
        settings |= {"format": format, "normalise": normalise}
    results: dict[str, dict[str, Any]] = {}
    for name in tasks:
        began = time.perf_counter()
        score = score_task(model, tokenizer, records[name], name, mode=mode, progress=progress, **settings)
        results[name] = {
            "file": str(tasks[name]),
            "accuracy": score.accuracy,
            "correct": score.correct,
            "total": score.total,
            "without_answer": score.predictions.count(None),
            "seconds": round(time.perf_counter() - began, 3),
        }
    return {
        "model": str(model_path),
        "mode": mode,
        "settings": settings | {"dtype": dtype, "limit": limit},
        "tasks": results,
        "average": sum(row["accuracy"] for row in results.values()) / len(results),
        "load_seconds": round(loaded - started, 3),
        "seconds": round(time.perf_counter() - loaded, 3),
    }


def check_settings(mode: str, normalise: str, batch_size: int) -> None:
    """Raise UserError for what no kind of model knows."""
    if mode not in MODES:
        raise UserError(f'mode {mode!r} is unknown; it is "generate" (the paper\'s) or "likelihood"')
    if normalise not in ("sum", "mean"):
        raise UserError(f'normalise {normalise!r} is unknown; it is "sum" or "mean"')
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be 1 or more")


def _check_format(mode: str, format: str) -> None:
    if format not in ANSWER_FIELDS:
        raise UserError(f"format {format!r} has no candidates to compare; give one of {', '.join(ANSWER_FIELDS)}")
    if mode == "generate" and format != "instruction":
        raise UserError(f'format {format!r}: the paper\'s way, mode "generate", is for "instruction" records only')


def _read(task: str, file: str, mode: str, format: str, limit: int | None) -> list[Record]:
    """The task's records, each one checked, so that nothing is wrong with them once the model is loaded."""
    needed = {field: kind for field, kind in FIELDS[format].items() if field != ANSWER_FIELDS[format]}
    located = list(read_records([file], needed))[:limit]
    for place, record in located:
        _prepared(place, task, record, mode, format)
    return [record for _, record in located]


def _prepared(place: str, task: str, record: Record, mode: str, format: str) -> tuple[list[str], int]:
    """The candidates and which of them is right; for generation, the right label alone."""
    try:
        if format == "instruction":
            generation_prompt(record)  # refuses what no prompt of this format can hold
        return ([gold_label(paper_task(task), record)], 0) if mode == "generate" else candidates(task, record)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _argmax(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
