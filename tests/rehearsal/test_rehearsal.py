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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_dist.checkpoint.run_folder import metrics
from dora_dist.checkpoint.state import open_state, state_file
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.rehearsal import pretend
from tests.rehearsal.cases import CASES, DECODERS, offloaded

PIECE = 100  # elements


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretend.build(tmp_path_factory.mktemp("device"))


def rehearse(device: Path, store: Path, *runs: dict[str, Any]) -> list[dict[str, Any]]:
    """On a rank: the runs, one after the other; the metrics of each."""
    from tests.distributed import training_runs

    sys.path.insert(0, str(ROOT / "examples"))
    with pretend.ranks(device, store):
        return training_runs.run(*runs)


def rehearse_sharded(device: Path, store: Path, *runs: dict[str, Any]) -> list[dict[str, Any]]:
    """The same, where every rank writes its own part of each checkpoint, in several pieces."""
    from dora_dist.checkpoint import format, state_writers

    state_writers.SHARDED_FROM_BYTES, state_writers.PIECE, format.PIECE = 0, PIECE, PIECE
    return rehearse(device, store, *runs)


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
    if name in DECODERS or name.startswith("llava"):  # others write no texts, or their prompts are too long
        lines = [line for run in case.runs for line in metrics(Path(run["checkpoint"]["run_dir"]))]
        assert all(line["samples"] for line in lines if line["event"] == "evaluation")
    if case.scored:
        run_ranks(score, 1, device, tmp_path / "store-1", case.plugins, *case.scored)


Offloaded = tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]]]
"""The metrics of runs, and what their last checkpoints hold."""


@pytest.fixture(scope="module")
def without_offload(device: Path, tmp_path_factory: pytest.TempPathFactory) -> Offloaded:
    """With checkpoints that every rank writes from its device, where the others have one file of rank 0."""
    folder = tmp_path_factory.mktemp("without-offload")
    found = _offloaded(device, folder, "none", "none", rehearse_sharded)
    files = [path.name for path in (folder / "run" / "checkpoint-3").glob("state*")]
    assert sorted(files) == [state_file(rank, 2) for rank in range(2)]
    return found


@pytest.mark.parametrize(("parameters", "optimizer"), [("cpu", "none"), ("none", "cpu"), ("cpu", "cpu")])
def test_offload_with_dynamic_rank_changes_no_number(
    device: Path, tmp_path: Path, without_offload: Offloaded, parameters: str, optimizer: str
) -> None:
    metrics, states = _offloaded(device, tmp_path, parameters, optimizer)
    assert metrics == without_offload[0] and states.keys() == without_offload[1].keys()
    for name, state in states.items():
        expected = without_offload[1][name]
        assert state and state.keys() == expected.keys()
        assert [key for key in state if not torch.equal(state[key], expected[key])] == []


def _offloaded(
    device: Path, folder: Path, parameters: str, optimizer: str, on_ranks: Callable[..., Any] = rehearse
) -> Offloaded:
    """What comes of runs whose engine keeps parameters and optimizer there."""
    case = offloaded(parameters, optimizer)(folder)
    metrics: list[dict[str, Any]] = run_ranks(on_ranks, case.ranks, device, folder / "store", *case.runs)[0]
    opened = {str(path.parent): open_state(path.parent) for path in sorted(folder.glob("*/checkpoint-*/manifest.json"))}
    states = {
        str(Path(name).relative_to(folder)): {key: state.read(key) for key in state.entries}
        for name, state in opened.items()
    }
    return metrics, states
