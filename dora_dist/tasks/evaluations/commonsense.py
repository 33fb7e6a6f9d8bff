"""The paper's eight commonsense tasks: which answers there are, and how one is read from generated text."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from dora_dist.runtime.errors import UserError

RESPONSE = "### Response:"
ANSWER = "the correct answer is "  # how every output of the eight training sets begins


@dataclass(frozen=True)
class AnswerLabels:
    """One task of Liu et al. (arXiv 2402.09353, Table 1): its name and its answer labels."""

    name: str
    labels: tuple[str, ...]

    def find(self, text: str) -> str | None:
        """The answer in a model's full output: the first label after the last "### Response:"."""
        match = re.search("|".join(self.labels), text.rpartition(RESPONSE)[2])
        return match[0] if match else None


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{i}" for i in range(1, count + 1))


PAPER_TASKS: dict[str, AnswerLabels] = {
    task.name: task
    for task in (
        AnswerLabels("boolq", ("true", "false")),
        AnswerLabels("piqa", _numbered("solution", 2)),
        AnswerLabels("social_i_qa", _numbered("answer", 5)),
        AnswerLabels("hellaswag", _numbered("ending", 4)),
        AnswerLabels("winogrande", _numbered("option", 2)),
        AnswerLabels("ARC-Easy", _numbered("answer", 5)),
        AnswerLabels("ARC-Challenge", _numbered("answer", 5)),
        AnswerLabels("openbookqa", _numbered("answer", 5)),
    )
}


def paper_task(name: str) -> AnswerLabels:
    """The paper's task of that name; UserError, with what a custom task needs, if there is none."""
    if name in PAPER_TASKS:
        return PAPER_TASKS[name]
    lower = {known.lower(): known for known in PAPER_TASKS}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f'; did you mean "{lower[near[0]]}"?' if near else "."
    raise UserError(
        f'task "{name}" is none of the paper\'s ({", ".join(PAPER_TASKS)}){hint} A task of your own needs '
        'records with "choices", a list of candidate answers, and --mode likelihood; or records of another --format '
        "(alpaca, completion, messages), whose answers are compared as they are"
    )


def gold_label(task: AnswerLabels, record: dict[str, Any]) -> str:
    """The record's "answer"; UserError unless it is one of the task's labels."""
    answer = record.get("answer")
    if answer not in task.labels:
        raise UserError(
            f'"answer" is {answer!r}, which is no label of task "{task.name}" ({", ".join(task.labels)}); '
            "is the file another task's?"
        )
    return str(answer)


def candidates(name: str, record: dict[str, Any]) -> tuple[list[str], int]:
    """The completions to compare for one record, and the position of the right one.

    These are the record's "choices", the right one being equal to "output", "completion" or "answer"; without
    choices, "the correct answer is X" for each of the paper's labels, of which only those that the
    instruction's "Answer format: X/Y/Z" names where there is one. Raises UserError if that gives no right
    candidate.
    """
    choices = record.get("choices")
    if choices is None:
        task = paper_task(name)
        gold = gold_label(task, record)
        offered = re.search(r"Answer format:\s*(\S+)", record.get("instruction", ""))
        named = offered[1].split("/") if offered else []
        labels = [label for label in task.labels if label in named] or list(task.labels)
        if gold not in labels:
            raise UserError(f'"answer" is {gold!r}, but the instruction offers {"/".join(labels)}')
        return [ANSWER + label for label in labels], labels.index(gold)
    _check_choices(choices)
    for field in ("output", "completion", "answer"):
        if record.get(field) in choices:
            return choices, choices.index(record[field])
    raise UserError(f'none of the "choices" {choices} is the record\'s "output", "completion" or "answer"')


def _check_choices(choices: Any) -> None:
    listed = isinstance(choices, list) and len(choices) > 1
    if not listed or not all(isinstance(choice, str) and choice for choice in choices):
        raise UserError(f'"choices" must be a list of two or more non-empty strings, found {choices!r}')
    if len(set(choices)) < len(choices):
        raise UserError(f'"choices" holds the same text twice: {choices}')
