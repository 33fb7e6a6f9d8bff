"""`make test-gpu` on a machine without a GPU: it says so, and nobody takes that for success."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
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
