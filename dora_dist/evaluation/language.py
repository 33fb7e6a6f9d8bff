"""Language models on files of records: checked first, then the model is loaded and asked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.data.records import FIELDS, Record, read_records
from dora_dist.evaluation.answers import ANSWERED, PAPER, Exchange, exchange, gold_answers, reference, score_answers
from dora_dist.evaluation.labels import check_format, right_answer, score_task, texts_of
from dora_dist.evaluation.lengths import check_lengths, positions_of
from dora_dist.runtime import console
from dora_dist.runtime.console import note
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LONGEST = 512
"""Most tokens of a free answer, unless told otherwise."""
Located = Sequence[tuple[str, Record]]


@dataclass(frozen=True)
class Asking:
    """How records are asked. max_new_tokens: None: as the references need, at most LONGEST."""

    mode: str
    format: str
    batch_size: int
    normalise: str
    num_beams: int
    max_new_tokens: int | None

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


def evaluate_language_model(
    model_path: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    mode: str = "generate",
    format: str | None = None,
    normalise: str = "sum",
    batch_size: int = 8,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    dtype: str = "bf16",
    base: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The result of `evaluation.evaluate` for a language model; its files are checked before it is loaded.

    `format` is by default that of the run in which the model was trained, else "instruction".
    """
    from dora_dist.evaluation.inference import base_folder, load_for_inference, run_of, tokenizer_at

    path, run = str(model_path), run_of(str(model_path))
    asking = Asking(mode, format or _format_of(run), batch_size, normalise, num_beams or 4, max_new_tokens or 32)
    if asking.free:
        asking = replace(asking, num_beams=num_beams or 1, max_new_tokens=max_new_tokens)
    check_format(asking.format)
    read = {name: _read(name, str(file), asking, limit) for name, file in tasks.items()}
    positions = positions_of(base_folder(path, base))
    tokenizer = tokenizer_at(path, base)
    kind = FreeAnswers if asking.free else Choices
    work = {name: kind(name, located, asking, tokenizer, positions) for name, located in read.items()}
    started = time.perf_counter()
    model, _ = load_for_inference(path, dtype, base)
    if mode == "generate" and model.generation_config.do_sample:
        note("the model's generation_config.json asks for sampling; answers are searched for without it")
    loaded = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    for name, task in work.items():
        began = time.perf_counter()
        row = task.score(model, progress)
        results[name] = {"file": str(tasks[name]), **row, "seconds": round(time.perf_counter() - began, 3)}
    accuracies = [row["accuracy"] for row in results.values() if "accuracy" in row]
    return {
        "model": path,
        "mode": mode,
        "settings": asking.settings | {"dtype": dtype, "limit": limit},
        "tasks": results,
        **({"average": sum(accuracies) / len(results)} if len(accuracies) == len(results) else {}),
        "load_seconds": round(loaded - started, 3),
        "seconds": round(time.perf_counter() - loaded, 3),
    }


def _format_of(run: Mapping[str, Any]) -> str:
    """The record format of a run's data, the paper's where there is no run."""
    its: str = run.get("data", {}).get("format", PAPER)
    if its != PAPER:
        note(f'records are read as the run\'s data.format says, "{its}"; --format gives another')
    return its


def _read(task: str, file: str, asking: Asking, limit: int | None) -> Located:
    """The task's records with their places. Those that are compared with their choices need not have an answer."""
    optional = None if asking.free else ANSWERED[asking.format]
    needed = {field: kind for field, kind in FIELDS[asking.format].items() if field != optional}
    located = list(read_records([file], needed))[:limit]
    for place, record in located if not asking.free else ():
        right_answer(place, task, record, asking.mode, asking.format)
    return located


class Choices:
    """One task whose answers are one of a few. Raises UserError, naming the record, for what does not fit."""

    def __init__(
        self,
        task: str,
        located: Located,
        asking: Asking,
        tokenizer: PreTrainedTokenizerFast,
        positions: int | None,
    ) -> None:
        self._task, self._asking, self._tokenizer = task, asking, tokenizer
        self._records = [record for _, record in located]
        lengths = []
        for place, record in located:
            texts = texts_of(task, place, record, asking.mode, asking.format, tokenizer)
            longest = max(texts, key=lambda each: len(each.text))
            lengths.append(_length(tokenizer, longest.text, longest.complete))
        new = asking.max_new_tokens if asking.mode == "generate" else None
        check_lengths([place for place, _ in located], lengths, positions, new or 0)

    def score(self, model: PreTrainedModel, progress: bool) -> dict[str, Any]:
        """The task's row of the result."""
        score = score_task(
            model,
            self._tokenizer,
            self._records,
            self._task,
            mode=self._asking.mode,
            progress=progress,
            **self._asking.settings,
        )
        return {
            "accuracy": score.accuracy,
            "correct": score.correct,
            "total": score.total,
            "without_answer": score.predictions.count(None),
        }


class FreeAnswers:
    """One task whose answers are texts of any kind. Raises UserError, naming the record, for what does not fit."""

    def __init__(
        self,
        task: str,
        located: Located,
        asking: Asking,
        tokenizer: PreTrainedTokenizerFast,
        positions: int | None,
    ) -> None:
        self._task, self._asking, self._tokenizer = task, asking, tokenizer
        self._places = [place for place, _ in located]
        self._exchanges = [_exchange(place, record, asking.format, tokenizer) for place, record in located]
        self._gold = [each.words for each in self._exchanges]
        prompts = [_length(tokenizer, each.prompt, each.complete) for each in self._exchanges]
        wholes = [_length(tokenizer, each.text, each.complete) + 1 for each in self._exchanges]
        check_lengths(self._places, wholes, positions)
        longest = max(whole - prompt for whole, prompt in zip(wholes, prompts, strict=True))
        self._new = asking.max_new_tokens or min(longest + 1, LONGEST)
        if asking.mode == "generate":
            records = [record for _, record in located]
            self._gold = gold_answers(task, self._places, records, self._exchanges)
            check_lengths(self._places, prompts, positions, self._new)

    def score(self, model: PreTrainedModel, progress: bool) -> dict[str, Any]:
        """The task's row of the result."""
        asking, total = self._asking, len(self._exchanges)
        with console.progress(total, f"{self._task} ({asking.mode})", " records", shown=progress) as bar:
            scores = score_answers(
                model,
                self._tokenizer,
                self._exchanges,
                self._gold,
                self._task,
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
