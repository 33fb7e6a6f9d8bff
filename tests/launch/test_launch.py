"""What a user types: launchers, recipes, and the messages of runs that cannot start."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.distributed.training_runs import config, metrics

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ["deepspeed", "--num_accelerators", "2", "launch/train.py"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    return toy.training_folder(folder)


def type_in(*words: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, from the repository's root, in this Python's environment, on the CPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [str(w) for w in words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def write_config(folder: Path, name: str, **changes: dict[str, Any]) -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config(folder / "base", folder / "data.json", folder / name, **changes)))
    return file


def test_from_launcher_to_merged_model_and_its_score(folder: Path) -> None:
    trained = type_in(*LAUNCH, "--config", write_config(folder, "main"), "--training.max_steps", 4)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    losses = metrics(folder / "main")["losses"]
    assert list(losses) == [1, 2, 3, 4] and losses[4] < losses[1]
    assert "loss" in trained.stdout and "tokens/s" in trained.stdout and "memory" in trained.stdout
    assert json.loads((folder / "main" / "config.json").read_text())["training"]["max_steps"] == 4
    assert json.loads((folder / "main" / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3

    more = type_in(
        sys.executable,
        "launch/train.py",
        "--config",
        folder / "main.json",
        "--resume",
        "--training.max_steps",
        6,
    )
    assert more.returncode == 0, more.stdout + more.stderr
    assert list(metrics(folder / "main")["losses"]) == [1, 2, 3, 4, 5, 6]

    merge = ["dora-dist", "consolidate", folder / "main", "--output", folder / "merged"]
    assert type_in(*merge).returncode == 0
    again = type_in(*merge)
    assert again.returncode == 2 and "already exists" in again.stderr and "--overwrite" in again.stderr

    tasks = ["--tasks", f"boolq={folder / 'data.json'}", "--mode", "likelihood", "--dtype", "fp32"]
    scores = []
    for number, model in enumerate((folder / "main", folder / "merged")):
        result = folder / f"result{number}.json"
        scored = type_in("dora-dist", "evaluate", model, *tasks, "--output", result)
        assert scored.returncode == 0, scored.stderr
        scores.append(json.loads(result.read_text())["tasks"]["boolq"])
    assert scores[0]["total"] == 25 and scores[0]["correct"] == scores[1]["correct"]


def test_the_llama_7b_recipe_trains_scaled_down_by_overrides_alone(folder: Path) -> None:
    toy.base_model(folder / "base-bf16", torch.bfloat16)
    run_dir = folder / "llama7b"
    overrides = {
        "model.path": folder / "base-bf16",
        "data.train": folder / "data.json",
        "data.validation_samples": 5,
        "adapter.r": 4,
        "training.max_steps": 4,
        "training.warmup_steps": 1,
        "training.eval_every": 2,
        "checkpoint.save_every": 2,
        "checkpoint.run_dir": run_dir,
        "logging.every": 1,
    }
    options = [word for name, value in overrides.items() for word in (f"--{name}", value)]
    trained = type_in(*LAUNCH, "--config", "configs/llama7b_dora.json", *options)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    found = metrics(run_dir)
    assert list(found["losses"]) == [1, 2, 3, 4] and set(found["eval"]) == {2, 4}
    best = json.loads((run_dir / "best.json").read_text())
    assert best["eval_loss"] == pytest.approx(min(found["eval"].values()))


BAD_LINE = json.dumps(toy.records(1)[0]) + "\n{broken\n"
NO_OUTPUT = json.dumps([{"instruction": "a", "input": ""}])


@pytest.mark.parametrize(
    ("changes", "file", "says"),
    [
        (
            {"training": {"learning_rat": 1.0}},
            None,
            ["training.learning_rat", "did you mean", "learning_rate"],
        ),
        ({"adapter": {"r": "many"}}, None, ["adapter.r", "many", "whole number"]),
        ({"model": {"path": "./nowhere"}}, None, ["model.path", "./nowhere", "no such folder"]),
        ({"data": {"train": "./nowhere.json"}}, None, ["data.train", "nowhere.json"]),
        ({}, ("empty.jsonl", ""), ["empty.jsonl", "empty"]),
        ({}, ("bad.jsonl", BAD_LINE), ["bad.jsonl", "2"]),
        ({}, ("fields.json", NO_OUTPUT), ["fields.json", "output"]),
        ({"adapter": {"target_modules": ["query"]}}, None, ["'query' matches no linear layer", "q_proj (2)"]),
        ({"training": {"global_batch_size": 1}}, None, ["training.global_batch_size", "2 ranks"]),
    ],
)
def test_what_cannot_start_says_what_to_change_and_leaves_nothing(
    folder: Path, changes: dict[str, Any], file: tuple[str, str] | None, says: list[str]
) -> None:
    if file is not None:
        (folder / file[0]).write_text(file[1])
        changes = {**changes, "data": {"train": str(folder / file[0]), "validation_samples": 0}}
    failed = type_in(*LAUNCH, "--config", write_config(folder, "bad", **changes), timeout=60)
    assert failed.returncode != 0
    for part in says:
        assert part in failed.stderr + failed.stdout, failed.stderr + failed.stdout
    assert "Traceback" not in failed.stderr
    assert not (folder / "bad").exists()


def test_a_truncated_base_ends_every_rank(folder: Path) -> None:
    base = toy.base_model(folder / "cut")
    os.truncate(base / "model.safetensors", 50_000)
    failed = type_in(*LAUNCH, "--config", write_config(folder, "bad", model={"path": str(base)}), timeout=60)
    assert failed.returncode != 0 and "model.safetensors" in failed.stderr + failed.stdout
    assert not (folder / "bad").exists()
