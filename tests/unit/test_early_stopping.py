"""Early stopping counts evaluations without a gain, from the log alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from dora_dist.checkpoint.early_stopping import COUNTS_AFTER, counts_after, without_gain
from dora_dist.checkpoint.resuming import finished
from dora_dist.config import CheckpointConfig, RunConfig
from dora_dist.config.schema import TrainingConfig
from dora_dist.training.checkpoints import Checkpoints
from dora_dist.training.unreadable import COUNTS


def counted(values: list[float], after: int = 0, **fields: Any) -> tuple[int, int]:
    """Evaluations without gain, and the step of the best, where step k has the k-th value."""
    training = TrainingConfig(eval_every=1, early_stopping=2, **fields)
    log = [{"step": step, f"eval_{training.metric}": value} for step, value in enumerate(values, 1)]
    waited, _, at = without_gain([{"step": 1, "loss": 0.0}, *log], training, after=after)
    return waited, at


@pytest.mark.parametrize(
    ("values", "fields", "expected"),
    [
        ([], {}, (0, 0)),
        ([3.0, 2.0, 2.5], {}, (1, 2)),
        ([3.0, 2.0, 2.0, 2.0], {}, (2, 2)),
        ([3.0, 2.95, 2.91, 2.89], {"early_stopping_min_delta": 0.1}, (0, 4)),  # 0.11 below 3.0, which is still the best
        ([3.0, 2.95, 2.91], {"early_stopping_min_delta": 0.1}, (2, 1)),
        ([0.5, 0.6, 0.6, 0.4], {"metric": "accuracy"}, (2, 2)),
        ([3.0, float("nan"), float("nan")], {}, (2, 1)),
        ([float("nan"), 3.0], {}, (0, 2)),
        ([1.0, 3.0, 2.0, 2.5], {"after": 1}, (1, 3)),  # of another metric or validation set
    ],
)
def test_evaluations_without_a_gain(values: list[float], fields: dict[str, Any], expected: tuple[int, int]) -> None:
    assert counted(values, **fields) == expected


PRUNED = {"components": {"budget": {"last": 3}}}


@pytest.mark.parametrize(
    ("fields", "ended"),
    [
        ({}, True),  # the best is of step 2, and four evaluations since were worse
        (PRUNED | {"compacted": True}, False),  # of an earlier version: those up to step 3 were while it pruned
        (PRUNED | {"compacted": False}, False),
        (PRUNED | {"compacted": False, COUNTS_AFTER: 2}, True),  # adapter.compact = false never compacts
        ({COUNTS_AFTER: 4}, False),  # resumed at step 4 with other validation data
    ],
)
def test_a_resume_counts_the_evaluations_that_the_run_counted(
    fields: dict[str, Any], ended: bool, tmp_path: Path
) -> None:
    raw = {"model": {"path": "m"}, "data": {"train": "d", "validation": "v"}}
    training = {"max_steps": 20, "eval_every": 1, "early_stopping": 3}
    config = RunConfig.from_dict({**raw, "training": training})
    log = [{"step": step, "eval_loss": loss} for step, loss in enumerate([2.0, 1.0, 3.0, 4.0, 5.0, 6.0], 1)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    trained_with = {
        "order": {"number of training samples": 100},
        "configuration": {"training": {"metric": "loss"}},
    }
    told = finished(tmp_path, {"step": 6, "trained_with": trained_with, **fields}, config)
    assert (told is not None and "where it ended early" in told) is ended


def test_a_checkpoint_says_from_where_on_evaluations_count_and_what_was_left_out(tmp_path: Path) -> None:
    kept: list[dict[str, Any]] = []
    saver: Any = SimpleNamespace(save=lambda folder, fields, state, **_: kept.append(fields))
    pruning: Any = SimpleNamespace(manifest_fields=dict, survivors=lambda: None)
    world: Any = SimpleNamespace(first=False)
    checkpoints = Checkpoints(saver, CheckpointConfig(run_dir=str(tmp_path)), world, trained_with={}, metric="loss")
    checkpoints.save(TrainerState(global_step=5), [1e-4], pruning, left_out={"read": 30}, counts_after=4)
    assert counts_after(kept[0]) == 4 and kept[0][COUNTS] == {"read": 30}
    assert counts_after({}) == 0
