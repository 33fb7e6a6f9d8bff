"""`evaluate`: a model's path and task files to a JSON result; `score_task`: one task, a language model in memory."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.data.formats import ANSWER_FIELDS, candidate, generation_prompt
from dora_dist.data.records import FIELDS, Record, local_file, read_records
from dora_dist.errors import UserError
from dora_dist.evaluation.encoders import evaluate_encoder
from dora_dist.evaluation.tasks import candidates, gold_label, paper_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MODES = ("generate", "likelihood")
_DEFAULTS = ("generate", "instruction", "sum")
_NOT_SHOWN = ("file", "without_answer", "seconds")


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
    _check(mode, format, batch_size, normalise)
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


def evaluate(
    model_path: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    mode: str = "generate",
    format: str = "instruction",
    batch_size: int = 8,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    normalise: str = "sum",
    limit: int | None = None,
    dtype: str | None = None,
    output: Path | None = None,
    progress: bool = True,
    fields: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a Hugging Face folder, PEFT folder, checkpoint or run on task files, and return a JSON-ready
    result.

    Args:
        tasks: name -> file with records. A language model's are of `format`: the paper's eight names need "answer"
            in every record, any other name needs "choices" and mode "likelihood". Other models' are of the format
            that they are trained on.
        num_beams, max_new_tokens: None: 4 and 32, or what a run that summarises was given.
        limit: only the first so many records of each file.
        dtype: None: bf16 for a language model; see `evaluate_encoder` for others.
        output: where to write the result as JSON, too.
        fields: of the configuration's data section (text_fields, label_field, cutoff_len, doc_stride), for models
            that are no language models.

    A language model's files are read and checked before it is loaded. Result: {"model", "mode", "settings", "tasks":
    {name: {"file", "accuracy", "correct", "total", "without_answer", "seconds"}}, "average" (of the accuracies),
    "load_seconds", "seconds"}; another model's has "task" instead of "mode" and "average", and its task's metrics.
    Raises UserError as `score_task` does, naming the file.
    """
    _check(mode, format, batch_size, normalise)
    if not tasks:
        raise UserError("no task to evaluate; give at least one, as name and file")
    for file in tasks.values():
        local_file(str(file))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    from dora_dist.models.inference import task_at
    from dora_dist.models.tasks import CAUSAL_LM, IMAGE_TEXT, SEQ2SEQ_LM

    task, fields = task_at(str(model_path)), dict(fields or {})
    if task.name == IMAGE_TEXT:
        raise UserError(f"{model_path}: answers about pictures are not evaluated here; its task is {task.name}")
    common: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "progress": progress}
    if task.name == CAUSAL_LM:
        _refuse(task.name, **fields)
        common |= {"num_beams": num_beams or 4, "max_new_tokens": max_new_tokens or 32, "dtype": dtype or "bf16"}
        result = _evaluate_language_model(model_path, tasks, mode=mode, format=format, normalise=normalise, **common)
    else:
        given = {"mode": mode, "format": format, "normalise": normalise}
        _refuse(task.name, **{name: None if value in _DEFAULTS else value for name, value in given.items()})
        if task.name != SEQ2SEQ_LM:
            _refuse(task.name, num_beams=num_beams, max_new_tokens=max_new_tokens)
        elif max_new_tokens is not None:
            fields["target_len"] = max_new_tokens
        result = evaluate_encoder(model_path, task, tasks, fields=fields, num_beams=num_beams, dtype=dtype, **common)
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _evaluate_language_model(
    model_path: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    mode: str,
    format: str,
    normalise: str,
    batch_size: int,
    num_beams: int,
    max_new_tokens: int,
    limit: int | None,
    dtype: str,
    progress: bool,
) -> dict[str, Any]:
    from dora_dist.models.inference import load_for_inference

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


def as_table(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` as lines of text: a row per task, and the average where there is one."""
    scores = {name: {k: v for k, v in row.items() if k not in _NOT_SHOWN} for name, row in result["tasks"].items()}
    columns = list(next(iter(scores.values())))
    rows = [["task", *columns]]
    for name, row in scores.items():
        rows.append([name, *(f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for v in row.values())])
    if "average" in result:
        rows.append(["average", f"{result['average']:.4f}"])
    width, wide = max(len(row[0]) for row in rows), max(8, *map(len, columns))
    return "\n".join("  ".join([f"{row[0]:<{width}}", *(f"{cell:>{wide}}" for cell in row[1:])]) for row in rows)


def _check(mode: str, format: str, batch_size: int, normalise: str) -> None:
    if mode not in MODES:
        raise UserError(f'mode {mode!r} is unknown; it is "generate" (the paper\'s) or "likelihood"')
    if format not in ANSWER_FIELDS:
        raise UserError(f"format {format!r} has no candidates to compare; give one of {', '.join(ANSWER_FIELDS)}")
    if mode == "generate" and format != "instruction":
        raise UserError(f'format {format!r}: the paper\'s way, mode "generate", is for "instruction" records only')
    if normalise not in ("sum", "mean"):
        raise UserError(f'normalise {normalise!r} is unknown; it is "sum" or "mean"')
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be 1 or more")


def _refuse(task: str, **settings: Any) -> None:
    """Raise UserError for the first setting that is given."""
    for name, value in settings.items():
        if value is not None:
            raise UserError(f"{name} = {value!r}: means nothing to this model, whose task is {task}; leave it out")


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
