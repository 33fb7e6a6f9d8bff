"""A rehearsal: whole runs of every family and task on a device that this machine does not have.

On a CPU nothing shows that a tensor was left on the host. Here `pretend.py` gives torch one more device, whose kernels
are the CPU's and which refuses, as a GPU does, what is not on it. Two ranks then run `train` as it is, through the code
that only accelerators reach: load, forward, backward, optimizer, norms, scoring, pruning, the DEM penalty, compaction
(survivors written, read and trained on), evaluation, saving; and one process runs `evaluate` on what they saved. Values
are real: whatever depends on them, such as generation, takes its course, and losses can be compared.

What it cannot show: the order of streams, kernels' own numbers, and NCCL.

FakeTensorMode would have no values: nothing that asks for one (a mask's sum, the end of a summary) could run as it is.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.rehearsal import pretend
from tests.rehearsal.cases import CASES, offloaded


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretend.build(tmp_path_factory.mktemp("device"))


def rehearse(device: Path, store: Path, *runs: dict[str, Any]) -> list[dict[str, Any]]:
    """On a rank: the runs, one after the other; the metrics of each."""
    from tests.distributed import training_runs

    sys.path.insert(0, str(ROOT / "examples"))
    with pretend.ranks(device, store):
        return training_runs.run(*runs)


def score(device: Path, store: Path, names: Sequence[str], *evaluations: dict[str, Any]) -> list[dict[str, Any]]:
    """In one process: the evaluations, with the plugins of these names."""
    from dora_dist.evaluation import evaluate
    from dora_dist.runtime import plugins

    sys.path.insert(0, str(ROOT / "examples"))
    plugins.load(names)
    with pretend.ranks(device, store):
        return [evaluate(**arguments)["tasks"] for arguments in evaluations]


@pytest.mark.parametrize("name", CASES)
def test_a_run_and_its_evaluation(device: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name](tmp_path)
    found = run_ranks(rehearse, case.ranks, device, tmp_path / "store", *case.runs)
    assert all(run["losses"] and run["eval"] for run in found[0])
    if case.scored:
        run_ranks(score, 1, device, tmp_path / "store-1", case.plugins, *case.scored)


@pytest.fixture(scope="module")
def without_offload(device: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _offloaded(device, tmp_path_factory.mktemp("without-offload"), "none", "none")


@pytest.mark.parametrize(("parameters", "optimizer"), [("cpu", "none"), ("none", "cpu"), ("cpu", "cpu")])
def test_offload_with_dynamic_rank_changes_no_number(
    device: Path, tmp_path: Path, without_offload: list[dict[str, Any]], parameters: str, optimizer: str
) -> None:
    assert _offloaded(device, tmp_path, parameters, optimizer) == without_offload


def _offloaded(device: Path, folder: Path, parameters: str, optimizer: str) -> list[dict[str, Any]]:
    """The losses of a rank whose engine keeps parameters and optimizer there."""
    case = offloaded(parameters, optimizer)(folder)
    metrics: list[dict[str, Any]] = run_ranks(rehearse, case.ranks, device, folder / "store", *case.runs)[0]
    return metrics
