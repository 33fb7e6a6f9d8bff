"""`evaluate`: a model's path and files of records to a JSON result, whatever the model's task."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_dist.data.records import local_file
from dora_dist.evaluation.inference import EvaluatedModel
from dora_dist.evaluation.records import RecordsEvaluation
from dora_dist.evaluation.results import check_output, write_result
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import TASKS, Task, task_named
from dora_dist.tasks.evaluations.base import Asked, Evaluation, Settings


def evaluate(
    model_path: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    base: str | None = None,
    output: Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate a Hugging Face folder, PEFT folder, checkpoint or run on files of records, in one process.

    Args:
        tasks: name -> file with records. A language model's are of `format` ("instruction", "alpaca",
            "completion" or "messages"; None: as the run says in which it was trained, else "instruction"). With
            "instruction", the paper's eight names need "answer" in every record, any other name needs "choices" and
            mode "likelihood". A LLaVA's are of `format` ("vqa", "multiple_choice", "pope" or "captions").
            Other models' are of the format that they are trained on.
        base: folder or hub name of the model that an adapter goes on; None: as its run, or else the adapter, says.
        output: where to write the result as JSON, too.
        settings: how records are asked, by the fields of `Settings`. In mode "generate", "instruction" records count
            by the first answer word in the model's text (as Liu et al. evaluate, section 4.1), other texts as a whole,
            compared with the record's answer (of a chat the last assistant turn), whose loss and perplexity are given,
            too. num_beams and max_new_tokens are by default 4 and 32 for "instruction"; 1 and as many as the longest
            reference has for a language model's own texts; 1 and as the format needs for a LLaVA; or what a run that
            summarises was given. dtype: bf16 for a language model, else the run's; where there is none, bf16 for a
            LLaVA, fp32 for others.

    Returns: {"model", "mode", "settings", "tasks": {name: {"file", "accuracy", "correct", "total", "without_answer",
    "seconds"}}, "average" (of the accuracies), "load_seconds", "seconds"}; of free answers a task has "exact_match",
    "loss", "perplexity" and "predictions" by record; another model's result has "task" and no "average", and its own
    metrics; a LLaVA's has "predictions", too.

    Raises UserError for what does not fit, naming file and record, and for NaN in the model. What can be checked
    without the model's weights is checked before they are read.

    Example::

        result = evaluate("runs/mine", {"boolq": "boolq.json"}, mode="likelihood")
        print(result["tasks"]["boolq"]["accuracy"])
    """
    chosen = Settings(**settings)
    if not tasks:
        raise UserError("no task to evaluate; give at least one, as name and file")
    for file in tasks.values():
        local_file(str(file))
    if output is not None:
        check_output(output)
    evaluated = EvaluatedModel(str(model_path), base)
    task = _task_of(evaluated)
    evaluation = task.evaluation(evaluated, chosen) or RecordsEvaluation(task, evaluated, chosen)
    asked = {name: evaluation.read(name, str(file)) for name, file in tasks.items()}
    measured = _measured(evaluated, evaluation, asked, files=tasks, progress=progress)
    result = {"model": str(model_path), **evaluation.facts, "settings": evaluation.settings, **measured}
    if output is not None:
        write_result(result, output)
    return result


def _task_of(evaluated: EvaluatedModel) -> Task:
    """The task of a model. Raises UserError for a run's that only a module from outside of the package registers."""
    theirs = evaluated.run.get("model", {}).get("task")
    if theirs is not None and theirs not in TASKS:
        raise UserError(
            f'{evaluated.path}: model.task = "{theirs}" is not known; name the module that has it in --plugins'
        )
    return task_named(evaluated.head.task)


def _measured(
    evaluated: EvaluatedModel,
    evaluation: Evaluation,
    asked: Mapping[str, Asked],
    *,
    files: Mapping[str, str | Path],
    progress: bool,
) -> dict[str, Any]:
    """What is found of all files, and how long loading the model and asking it took."""
    started = time.perf_counter()
    model = evaluated.load(evaluation.dtype)
    evaluation.loaded(model)
    loaded, rows = time.perf_counter(), {}
    for name, records in asked.items():
        began = time.perf_counter()
        row = records.score(model, progress=progress)
        rows[name] = {"file": str(files[name]), **row, "seconds": round(time.perf_counter() - began, 3)}
    return {
        "tasks": rows,
        **evaluation.summary(rows),
        "load_seconds": round(loaded - started, 3),
        "seconds": round(time.perf_counter() - loaded, 3),
    }
