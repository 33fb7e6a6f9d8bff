"""Whether a run's configuration fits its task: names that no task has, and each task's own rules."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from dora_dist.config.fields import field_specs
from dora_dist.config.mixture import mixture_of
from dora_dist.config.problems import listed
from dora_dist.runtime import plugins
from dora_dist.tasks.task import TASKS, Task

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, RunConfig


def check(config: RunConfig, origin: str = "configuration") -> None:
    """Raise one UserError over all `problems` of a run. `origin`: where the configuration is from."""
    if found := list(problems(config)):
        raise listed(found, origin)


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with a run as one of its task, one line each; imports the run's plugins, which may bring the task.

    These are rules for `RunConfig.load` and `RunConfig.from_dict`, which tell them together with all other rules.
    """
    plugins.load(config.plugins)
    task = TASKS.get(config.model.task)
    of_data = next((each for each in (task, *TASKS.values()) if each and config.data.format in each.formats), None)
    if task is None:
        yield _unknown("model.task", config.model.task, TASKS, config)
    else:
        yield from task.problems(config)
    if of_data is None:
        formats = [format for each in TASKS.values() for format in each.formats]
        yield _unknown("data.format", config.data.format, formats, config)
    else:
        yield from of_data.problems_of_data(config.data)
        yield from _by_task(of_data, config.data)
        yield from _of_mixture(of_data, config.data)
        yield from _fields_of_others(of_data, config.data)
    if task and of_data and task is not of_data:
        yield from _not_together(task, of_data, config.data.format)


def _unknown(field: str, value: str, known: Iterable[str], config: RunConfig) -> str:
    names = list(known)
    meant = difflib.get_close_matches(value, names, 1)
    hint = f"; did you mean {json.dumps(meant[0])}?" if meant else ""
    described = field_specs(type(config))[field].description
    return f"{field} = {json.dumps(value)}: must be one of {', '.join(map(json.dumps, names))} ({described}){hint}"


def _not_together(task: Task, of_data: Task, format: str) -> Iterator[str]:
    """A task and a format of another one, explained by each of the two that has no choice of formats."""
    given = f'model.task = "{task.name}" and data.format = "{format}"'
    strict = [each for each in TASKS.values() if each in (task, of_data) and len(each.formats) == 1]
    for each in strict:
        yield f"{given}: {each.name} and the format {each.formats[0]} go together"
    if not strict:
        yield f"{given}: {task.name} takes {' and '.join(task.formats)}"


def _by_task(task: Task, data: DataConfig) -> Iterator[str]:
    """Values that are said by task, where records are of one kind alone."""
    remedies = dict.fromkeys(("train", "validation"), "a file, or a list of files")
    remedies |= dict.fromkeys(("cutoff_len", "target_len"), "a number")
    for field, remedy in remedies.items():
        if not task.several and isinstance(getattr(data, field), dict):
            yield (
                f'data.{field} = {json.dumps(getattr(data, field))}: records of data.format = "{data.format}" are of '
                f"one kind; give {remedy}"
            )


def _of_mixture(task: Task, data: DataConfig) -> Iterator[str]:
    """Sources that are mixed by weights, of a task that has none, or in formats that do not go together."""
    mixture = mixture_of(data.train)
    if mixture and task.several:
        yield f'data.train: records of data.format = "{data.format}" are of several tasks; give files for each task'
    for number, source in enumerate(mixture, start=1):
        if source.format is not None and source.format not in task.formats:
            yield (
                f'data.train, source {number}: format = "{source.format}" does not go with data.format = '
                f'"{data.format}"; a mixture is of {" and ".join(task.formats)}'
            )
    named = [source.name for source in mixture if source.name]
    if twice := [name for name in named if named.count(name) > 1]:
        yield f'data.train: two sources have the name "{twice[0]}"; give each its own'


def _fields_of_others(task: Task, data: DataConfig) -> Iterator[str]:
    for name, field in type(data).model_fields.items():
        owners = [each for each in TASKS.values() if name in each.fields]
        value = getattr(data, name)
        if not owners or name in task.fields_of(data) or value == field.default:
            continue
        formats = " and ".join(format for each in owners for format in each.formats)
        yield (
            f'data.{name} = {json.dumps(value)}: has no meaning for data.format = "{data.format}", only for {formats}; '
            "take it out, or set data.format"
        )
