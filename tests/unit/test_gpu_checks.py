"""`make test-gpu` on a machine without a GPU: it says so, and nobody takes that for success."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_dist.config import RunConfig
from dora_dist.tasks import problems
from tests import llava
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of `recipes.write_models` that is read before ranks start."""
    folder = tmp_path_factory.mktemp("models")
    llava.write(folder / "conversations", 10, 6)
    return folder


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_scaled_down_are_configurations(models: Path, tmp_path: Path, name: str) -> None:
    words = recipes.scaled(name, models, tmp_path / "run", ranks=2)["overrides"]
    config = RunConfig.load(recipes.CONFIGS / f"{name}.json", words, rules=problems)
    assert config.training.max_steps == recipes.STEPS
    assert str(config.model.path).startswith(str(models))
