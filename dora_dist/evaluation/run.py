"""`evaluate`: a model's path and task files to a JSON result, by what the model is."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dora_dist.data.records import local_file
from dora_dist.evaluation.encoders import evaluate_encoder
from dora_dist.evaluation.labels import check_settings
from dora_dist.evaluation.language import evaluate_language_model
from dora_dist.evaluation.pictures import PICTURE_FIELDS, evaluate_pictures
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import disk_errors

ENCODER_FIELDS = ("text_fields", "label_field", "cutoff_len", "doc_stride", "target_len")
_NOT_SHOWN = ("file", "without_answer", "seconds", "max_new_tokens", "predictions")


def evaluate(
    model_path: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    mode: str | None = None,
    format: str | None = None,
    instruction: str | None = None,
    batch_size: int = 8,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    normalise: str | None = None,
    limit: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
    output: Path | None = None,
    progress: bool = True,
    fields: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a Hugging Face folder, PEFT folder, checkpoint or run on task files, and return a JSON-ready
    result.

    Args:
        tasks: name -> file with records. A language model's are of `format` ("instruction", "alpaca", "completion" or
            "messages"; None: as the run says in which it was trained, else "instruction"). With "instruction", the
            paper's eight names need "answer" in every record, any other name needs "choices" and mode "likelihood".
            A LLaVA's are of `format` ("vqa", "multiple_choice", "pope" or "captions"; see `questions`). Other models'
            are of the format that they are trained on.
        mode: "generate" (the default): for "instruction" the first answer word in the model's text (as Liu et al.
            evaluate, section 4.1), else its whole text, compared with the record's answer (of a chat the last assistant
            turn), whose loss and perplexity are given, too; "loss": these two alone; "likelihood": the most probable of
            a record's candidates, by the sum or, with `normalise` "mean", the average over its tokens.
        instruction: what follows a question about a picture; None: what LLaVA-1.5 was trained with for `format`.
        num_beams, max_new_tokens: None: 4 and 32 for "instruction"; 1 and as many as the longest reference has for
            a language model's own texts; 1 and as `format` needs for a LLaVA; or what a run that summarises was given.
        limit: only the first so many records of each file.
        dtype: None: bf16 for a language model, else the run's; where there is none, bf16 for a LLaVA, fp32 for others.
        base: folder or hub name of the model that an adapter goes on; None: as its run, or else the adapter, says.
        output: where to write the result as JSON, too.
        fields: of the configuration's data section: ENCODER_FIELDS for models that label, rate, find answers or
            summarise, PICTURE_FIELDS for a LLaVA.

    Files of a language model and of a LLaVA are read and checked before it is loaded. Result: {"model", "mode",
    "settings", "tasks": {name: {"file", "accuracy", "correct", "total", "without_answer", "seconds"}}, "average" (of
    the accuracies), "load_seconds", "seconds"}; of free answers a task has "exact_match", "loss", "perplexity" and
    "predictions" by record; another model's result has "task" and no "average", and its own metrics; a LLaVA's has
    "predictions", too. Raises UserError for what does not fit, naming file and record, and for NaN in the model.
    """
    check_settings(mode or "generate", normalise or "sum", batch_size)
    if not tasks:
        raise UserError("no task to evaluate; give at least one, as name and file")
    for file in tasks.values():
        local_file(str(file))
    if output is not None:
        check_output(output)
    result = _by_task(
        model_path,
        tasks,
        asking=_given(mode=mode, format=format, instruction=instruction, normalise=normalise),
        searching=_given(num_beams=num_beams, max_new_tokens=max_new_tokens),
        fields=dict(fields or {}),
        common={"batch_size": batch_size, "limit": limit, "progress": progress, **_given(dtype=dtype, base=base)},
    )
    if output is not None:
        write_result(result, output)
    return result


def check_output(output: Path) -> None:
    """Make the folder of a result's file. Raises UserError where it cannot be written, or would replace a file that is
    not a result: what took long to compute is not to be lost for it.
    """
    if os.path.isdir(output):  # which, other than Path's, takes any text for an answer
        raise UserError(f"--output {output}: is a folder; give the name of a file in it")
    if os.path.exists(output) and not output.is_file():
        return  # a device or a pipe
    if os.path.exists(output) and not _is_result(output):
        raise UserError(f"--output {output}: is there already and is not a result of evaluate; give another name")
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _partial(output).touch()
        _partial(output).unlink()


def _is_result(file: Path) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"model", "tasks", "settings"} <= set(found)


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial-{os.getpid()}")


def write_result(result: Mapping[str, Any], output: Path) -> None:
    """Write the result of `evaluate` as JSON; a file takes its name only when it is whole. Raises UserError."""
    text = json.dumps(result, indent=2) + "\n"
    partial = _partial(output)
    with disk_errors(output):
        if output.exists() and not output.is_file():
            output.write_text(text, encoding="utf-8")
            return
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)


def _by_task(
    model_path: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    asking: dict[str, Any],
    searching: dict[str, Any],
    fields: dict[str, Any],
    common: dict[str, Any],
) -> dict[str, Any]:
    """The evaluation of this kind of model. Raises UserError for a setting that means nothing to it."""
    from dora_dist.evaluation.inference import head_at
    from dora_dist.models.heads import CAUSAL_LM, IMAGE_TEXT_TO_TEXT, SEQ2SEQ_LM

    task = head_at(str(model_path))
    if asking.get("mode") == "loss" and task.task != CAUSAL_LM.task:
        raise UserError(f"--mode loss: is for a language model, and this is {task.task}; leave it out")
    if task.task in (CAUSAL_LM.task, IMAGE_TEXT_TO_TEXT.task):
        _refuse_other_modes(asking, searching)
    if task.task == CAUSAL_LM.task:
        _refuse(task.task, fields | {name: value for name, value in asking.items() if name == "instruction"})
        return evaluate_language_model(model_path, tasks, **asking, **searching, **common)
    if task.task == IMAGE_TEXT_TO_TEXT.task:
        _refuse(task.task, fields, PICTURE_FIELDS)
        return evaluate_pictures(model_path, tasks, fields=fields, **asking, **searching, **common)
    _refuse(task.task, fields | asking, ENCODER_FIELDS)
    if task.task != SEQ2SEQ_LM.task:
        _refuse(task.task, searching)
    if "max_new_tokens" in searching:
        fields["target_len"] = searching.pop("max_new_tokens")
    return evaluate_encoder(model_path, task, tasks, fields=fields, **searching, **common)


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _refuse(task: str, settings: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """Raise UserError for the first setting that is not known."""
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"{_typed(name, value)}: means nothing to this model, whose task is {task}; leave it out")


def _refuse_other_modes(asking: Mapping[str, Any], searching: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that another mode has."""
    mode = asking.get("mode", "generate")
    of_others = searching if mode != "generate" else {}
    if mode != "likelihood":
        of_others = {**of_others, **{name: value for name, value in asking.items() if name == "normalise"}}
    for name, value in of_others.items():
        raise UserError(f"{_typed(name, value)}: means nothing with --mode {mode}; leave it out")


def _typed(name: str, value: Any) -> str:
    """A setting as it is typed."""
    shown = " ".join(map(str, value)) if isinstance(value, list) else repr(value) if value == "" else value
    return f"--{name.replace('_', '-')} {shown}"


def as_table(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` as lines of text: a row per task, and the average where there is one."""
    scores = {name: {k: v for k, v in row.items() if k not in _NOT_SHOWN} for name, row in result["tasks"].items()}
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    rows = [["task", *columns]]
    for name, row in scores.items():
        rows.append([name, *(_cell(row.get(column)) for column in columns)])
    if "average" in result:
        rows.append(["average", f"{result['average']:.4f}"])
    width, wide = max(len(row[0]) for row in rows), max(8, *map(len, columns))
    lines = ("  ".join([f"{row[0]:<{width}}", *(f"{cell:>{wide}}" for cell in row[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: float | int | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
