"""One run: trained as a user would train it, measured on texts that it never saw, and kept as one JSON file."""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stages import ROOT, as_options, losses, read_jsonl, trained_numbers

from claimbench.methods import Method
from claimbench.tasks import Task, model_folder, split_file
from dora_dist.config import RunConfig
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import write_json

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs share. Runs, texts and models are in `folder`; each run has one core, `parallel` run at once."""

    folder: Path
    steps: int
    batch: int
    parallel: int


@dataclass(frozen=True)
class Run:
    """A method at a size, with a learning rate and a seed, on a task; `split` is what it is measured on."""

    task: Task
    name: str
    method: Method
    r: int
    rate: float
    seed: int
    split: str

    @property
    def label(self) -> str:
        size = f"-r{self.r}" if self.method.sized else ""
        return f"{self.task.name}-{self.name}{size}-{self.rate:g}-seed{self.seed}-{self.split}"


def results(runs: Iterable[Run], settings: Settings) -> dict[Run, Result]:
    """The result of every run, in the order given; those that are known are not repeated.

    Raises UserError where a run fails; what others had found is kept.
    """
    wanted = list(dict.fromkeys(runs))
    with ThreadPoolExecutor(settings.parallel) as pool:
        try:
            return dict(zip(wanted, pool.map(lambda run: result(run, settings), wanted), strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def result(run: Run, settings: Settings) -> Result:
    """Train and measure, in processes of their own; or what is known, if it was found with the same settings.

    It has "accuracy", "right" (a "1" or "0" for each question), "trained_numbers" at the end, and "loss" at the last
    step that was logged.
    """
    folder, file = settings.folder / "runs" / run.label, settings.folder / "results" / f"{run.label}.json"
    options = options_of(run, settings, folder)
    described = made(run, settings, options)
    if file.exists():
        known: Result = json.loads(file.read_text(encoding="utf-8"))
        if known["made"] == described:
            return known
    print(f"{run.label} ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_name(f"{folder.name}.log")  # the name has dots of its own
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        call(["dora-dist", "train", "--config", run.method.recipe, *options], out, log)
        questions = split_file(settings.folder, run.task, run.split)
        right = _measured(folder, questions, out, log)
    found = {
        "made": described,
        "accuracy": right.count("1") / len(right),
        "right": right,
        "trained_numbers": trained_numbers(folder),
        "loss": losses(folder)[1],
    }
    file.parent.mkdir(exist_ok=True)
    write_json(file, found)
    for checkpoint in folder.glob("checkpoint-*"):  # of full fine-tuning 12 bytes a parameter
        shutil.rmtree(checkpoint)
    print(f"{run.label}: {found['accuracy']:.4f}", flush=True)
    return found


def baseline(task: Task, settings: Settings) -> tuple[str, float]:
    """What a task's test records are to be compared with, in words, and its accuracy: the model before it is trained;
    where training makes the model's head, the most frequent label.
    """
    texts = split_file(settings.folder, task, "test")
    records = read_jsonl(texts)
    if "label" in records[0]:
        return "most frequent label", _most_frequent(records)
    file = settings.folder / "results" / f"{task.name}-untrained.json"
    digest = _digest(texts)
    if not file.exists() or (known := json.loads(file.read_text(encoding="utf-8")))["texts"] != digest:
        log = settings.folder / "runs" / f"{task.name}-untrained.log"
        for path in (log, file):
            path.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as out:
            right = _measured(model_folder(settings.folder, task), texts, out, log)
        known = {"texts": digest, "accuracy": right.count("1") / len(right), "right": right}
        write_json(file, known)
    return "before training", known["accuracy"]


def least(task: Task, settings: Settings) -> float:
    """What a model that learnt nothing gets of the validation texts: one answer's share, or two standard errors more
    than guesses among choices."""
    records = read_jsonl(split_file(settings.folder, task, "validation"))
    if "choices" not in records[0]:
        return _most_frequent(records)
    guessed = statistics.mean(1 / len(record["choices"]) for record in records)
    return guessed + 2 * (guessed * (1 - guessed) / len(records)) ** 0.5


def _most_frequent(records: list[Result]) -> float:
    answers = Counter(record["label" if "label" in record else "completion"] for record in records)
    return max(answers.values()) / len(records)


def options_of(run: Run, settings: Settings, folder: Path) -> list[str]:
    """What departs from the method's recipe, as `dora-dist train` takes it."""
    steps = settings.steps * run.task.longer
    fields = {
        **run.task.fields,
        **run.method.at(run.r),
        "model.path": model_folder(settings.folder, run.task),
        "data.train": split_file(settings.folder, run.task, "train"),
        "training.learning_rate": run.rate,
        "training.max_steps": steps,
        "training.warmup_steps": max(1, steps // 16),
        "training.global_batch_size": settings.batch,
        "training.micro_batch_size": settings.batch,
        "training.seed": run.seed,
        "checkpoint.run_dir": folder,
        "logging.progress_bar": False,
    }
    words = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    return [*as_options(words), *run.method.options]


def made(run: Run, settings: Settings, options: list[str]) -> dict[str, Any]:
    """All that a result depends on, but the code: the whole configuration, defaults too, and the texts."""
    config = RunConfig.load(ROOT / run.method.recipe, options)
    texts = [split_file(settings.folder, run.task, split) for split in ("train", run.split)]
    return {"configuration": json.loads(config.to_json()), "texts": [_digest(path) for path in texts]}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _measured(model: Path, questions: Path, out: IO[str], log: Path) -> str:
    """A "1" or "0" for each question."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "right.json"
        call([sys.executable, "-m", "claimbench.measure", model, questions, found], out, log)
        right: str = json.loads(found.read_text(encoding="utf-8"))
    return right


def call(command: list[str | Path], out: IO[str], log: Path) -> None:
    """Run a command on one core, its output going to `out`, which is the file `log`. Raises UserError if it fails."""
    folder = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    words = [str(word) for word in command]
    if subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False).returncode:
        raise UserError(f"{' '.join(words[:3])} failed; its messages are in {log}")
