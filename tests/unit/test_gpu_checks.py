"""`make test-gpu` on a machine without a GPU: it says so, and nobody takes that for success; its recipes are runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_dist.config import RunConfig
from dora_dist.config.names import by_task, listed
from dora_dist.data import read
from dora_dist.tasks import TASKS, problems
from tests import subtasks, summaries
from tests.conftest import ROOT
from tests.gpu import recipes
from tests.gpu.__main__ import as_markdown
from tests.gpu.machine import NOT_A_RESULT


def test_without_a_gpu_nothing_is_run_and_the_exit_status_says_so() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DORA_DIST_TEST_DEVICE"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "tests.gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "NOT RUN: no GPU" in done.stderr and "passed" not in done.stdout


@pytest.mark.parametrize("rehearsal", [True, False])
def test_a_rehearsal_never_looks_like_a_result(rehearsal: bool) -> None:
    checks = [("resumed", "passed", "equal"), ("hpZ", "not run", "needs ranks"), ("bart", "FAILED", "")]
    machine = {"device": "some"}
    shown = as_markdown({"rehearsal": rehearsal, "machine": machine, "seconds": 7, "checks": checks})
    assert (NOT_A_RESULT in shown) == rehearsal
    assert "1 of 3 checks passed" in shown and "| bart    | FAILED  |" in shown


def test_every_recipe_scaled_down_is_a_run_on_its_records(tmp_path: Path) -> None:
    recipes.write_records(tmp_path)
    tokenizer = summaries.tokenizer(subtasks.texts())
    for name in recipes.RECIPES:
        overrides = recipes.scaled(name, tmp_path, tmp_path / name, 2)["overrides"]
        config = RunConfig.load(recipes.CONFIGS / f"{name}.json", overrides, rules=problems)
        data = config.data.model_copy(update={"cache": None})
        assert all(Path(file).exists() for file in [*listed(data.train), *listed(data.features)])
        if data.format == "vision_text":
            assert Path(config.model.path).name == "bart"
            reader = TASKS[config.model.task].reader(tokenizer, model=config.model, data=data)
            train = read(reader, data, seed=0, progress=False).train
            assert len(train) == 40 * len(by_task(data.train)) and train[0]["visual"]
