"""A run on two ranks that evaluation ends early: well, and finished; with more patience it counts on."""

import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dora_dist.checkpoint import run_folder
from tests import toy
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks

PATIENT = {"max_steps": 9, "eval_every": 1, "early_stopping": 2, "early_stopping_min_delta": 100.0}


def three_starts(folder: Path) -> list[tuple[int, str, list[int]]]:
    """Of each start: the last event's step, its name, and the steps of the checkpoints. Nothing on other ranks than the
    first, which alone writes it, and may be the last to end.
    """
    found, run_dir = [], folder / "run"
    for patience, resume in ((2, None), (2, "auto"), (3, "auto")):
        changes: dict[str, dict[str, Any]] = {
            "training": {**PATIENT, "early_stopping": patience},
            "checkpoint": {"keep_best": True, "save_every": None, "resume": resume},
        }
        printed = f"printed-{patience}-{resume}-{os.environ['RANK']}"
        with (folder / printed).open("w") as file, redirect_stdout(file):
            run(config(folder / "base", folder / "data.json", run_dir, **changes))
        if dist.get_rank() > 0:
            continue
        last = run_folder.metrics(run_dir)[-1]
        steps = [run_folder.step_of(checkpoint) for checkpoint in run_folder.checkpoints(run_dir)]
        found.append((last["step"], last["how"], steps))
    return found


def test_a_run_ends_early_and_well_and_is_then_finished(tmp_path: Path) -> None:
    toy.training_folder(tmp_path)
    early, again, longer = run_ranks(three_starts, 2, tmp_path)[0]
    assert early[:2] == (3, "finished") and early[2][-1] == 3
    assert again == early  # nothing was left to do
    assert longer[:2] == (4, "finished")  # one evaluation more, not three
    assert [line["step"] for line in run_folder.metrics(tmp_path / "run") if line["event"] == "early_stop"] == [3, 4]
    assert run_folder.best_checkpoint(tmp_path / "run") is not None
    assert "ended early: no better loss in 2 evaluations since step 1" in (tmp_path / "printed-2-None-0").read_text()
    printed = (tmp_path / "printed-2-auto-0").read_text()
    assert "the run is finished" in printed and "larger training.early_stopping" in printed
