"""A rehearsal: whole runs of every family and task on a device that this machine does not have.

On a CPU nothing shows that a tensor was left on the host. Here `pretend.py` gives torch one more device, whose kernels
are the CPU's and which refuses, as a GPU does, what is not on it. Two ranks then run `train` as it is, through the code
that only accelerators reach: load, forward, backward, optimizer, norms, scoring, pruning, the DEM penalty, compaction
(survivors written, read and trained on), evaluation, saving; and one process runs `evaluate` on what they saved. Values
are real: whatever depends on them, such as generation, takes its course, and losses can be compared.

What it cannot show: the order of streams, kernels' own numbers, and NCCL.

FakeTensorMode would have no values: nothing that asks for one (a mask's sum, the end of a summary) could run as it is.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.rehearsal import pretend
from tests.rehearsal.cases import CASES, offloaded


@pytest.fixture(scope="session")
def device() -> Path:
    return pretend.build()


def rehearse(device: Path, store: Path, *runs: dict[str, Any]) -> list[dict[str, Any]]:
    """On a rank: the runs, one after the other; the metrics of each."""
    from tests.distributed import training_runs

    with pretend.ranks(device, store):
        return training_runs.run(*runs)


def score(device: Path, store: Path, *evaluations: dict[str, Any]) -> list[dict[str, Any]]:
    """In one process: the evaluations."""
    from dora_dist.evaluation import evaluate

    with pretend.ranks(device, store):
        return [evaluate(**arguments)["tasks"] for arguments in evaluations]


@pytest.mark.parametrize("name", CASES)
def test_a_run_and_its_evaluation(device: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name](tmp_path)
    found = run_ranks(rehearse, 2, device, tmp_path / "store", *case.runs)
    assert all(run["losses"] and run["eval"] for run in found[0])
    if case.scored:
        run_ranks(score, 1, device, tmp_path / "store-1", *case.scored)


def test_offload_with_dynamic_rank(device: Path, tmp_path: Path) -> None:
    """Where the engine keeps parameters and optimizer changes no number."""
    found = {}
    for parameters, optimizer in (("none", "none"), ("cpu", "none"), ("none", "cpu"), ("cpu", "cpu")):
        folder = tmp_path / f"parameters-{parameters}-optimizer-{optimizer}"
        folder.mkdir()
        case = offloaded(parameters, optimizer)(folder)
        found[folder.name] = run_ranks(rehearse, 2, device, folder / "store", *case.runs)[0]
    first, *others = found.values()
    for other in others:
        assert other == first
