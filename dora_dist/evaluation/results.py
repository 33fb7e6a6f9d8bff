"""The result of `evaluate` as a JSON file, and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import disk_errors, new_file

_NOT_SHOWN = ("file", "without_answer", "seconds", "max_new_tokens", "predictions")


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
        probe = output.with_name(f".{output.name}.probe-{os.getpid()}")
        probe.touch()
        probe.unlink()


def _is_result(file: Path) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"model", "tasks", "settings"} <= set(found)


def write_result(result: Mapping[str, Any], output: Path) -> None:
    """Write the result of `evaluate` as JSON; a file takes its name only when it is whole. Raises UserError."""
    text = json.dumps(result, indent=2) + "\n"
    with disk_errors(output):
        if output.exists() and not output.is_file():
            output.write_text(text, encoding="utf-8")
            return
        with new_file(output) as partial:
            partial.write_text(text, encoding="utf-8")


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
