"""Early stopping: how long evaluation has brought nothing, from the log that a checkpoint keeps.

Besides it, a checkpoint says from where on evaluations count, so a run that is resumed counts on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.checkpoint.run_folder import TRAINER_STATE

if TYPE_CHECKING:
    from dora_dist.config import TrainingConfig

COUNTS_AFTER = "evaluations_count_after"
"""Of a checkpoint's manifest (`counts_after`)."""


def without_gain(
    log: Iterable[Mapping[str, Any]], training: TrainingConfig, *, after: int = 0
) -> tuple[int, float, int]:
    """Evaluations since the last that was better than the best before it, and that one's metric and step.

    log: lines of a TrainerState's log_history. Better is by more than training.early_stopping_min_delta, in
    training.metric, of which the loss is to be low and others high; the first evaluation after step `after` is the
    first that counts.
    """
    name, sign = f"eval_{training.metric}", -1 if training.metric == "loss" else 1
    waited, best, at = 0, -float("inf"), 0
    for line in log:
        if name not in line or line["step"] <= after:
            continue
        value = sign * float(line[name])  # NaN does not count as better
        if value > best + training.early_stopping_min_delta or (at == 0 and value == value):
            waited, best, at = 0, value, int(line["step"])
        else:
            waited += 1
    return waited, sign * best, at


def counts_after(manifest: Mapping[str, Any]) -> int:
    """The step of a checkpoint's run after which evaluations count: those while it pruned, or of other validation data,
    do not.
    """
    pruning = manifest.get("components", {}).get("budget", {}).get("last", 0)
    return int(manifest.get(COUNTS_AFTER, pruning))  # earlier versions did not say it


def ended_early(folder: Path, manifest: Mapping[str, Any], training: TrainingConfig) -> str | None:
    """That the run of a checkpoint has ended by early stopping, in words; None if it goes on."""
    if training.early_stopping is None:
        return None
    state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    waited, best, at = without_gain(state.get("log_history", []), training, after=counts_after(manifest))
    return told(training, waited, best, at) if waited >= training.early_stopping else None


def told(training: TrainingConfig, waited: int, best: float, at: int) -> str:
    """The reason, for people."""
    return (
        f"no better {training.metric} in {waited} evaluations since step {at} ({best:.4f}; training.early_stopping = "
        f"{training.early_stopping})"
    )
