"""Early stopping counts evaluations without a gain, from the log alone."""

from typing import Any

import pytest

from dora_dist.checkpoint.early_stopping import without_gain
from dora_dist.config.schema import TrainingConfig


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
