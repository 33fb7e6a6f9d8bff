"""The lines of a run: columns that fit the screen, and events in words."""

from typing import Any

import pytest

from dora_dist.training.reporting import event_text, sample_text
from dora_dist.training.table import HEADER_EVERY, Table, duration

RECORD = {
    "step": 1200,
    "epoch": 1.25,
    "loss": 0.51234,
    "grad_norm": 0.11,
    "learning_rate": 4.6e-4,
    "tokens_per_second": 12226.4,
    "peak_memory_gb": 22.36,
    "elapsed": 41.2,
    "left": 3727.0,
    "mfu": 0.412,
}


@pytest.mark.parametrize(
    ("columns", "titles"),
    [
        (40, "step epoch loss left"),
        (80, "step epoch loss grad norm lr tokens/s time left"),
        (120, "step epoch loss grad norm lr tokens/s MFU memory time left"),
    ],
)
def test_columns_fit_the_screen(columns: int, titles: str) -> None:
    empty, head, row = Table(9000, columns).row(RECORD)
    assert empty == "" and " ".join(head.split()) == titles
    assert len(head) == len(row) <= columns
    assert row.startswith("1,200/9,000  ")


def test_values_stand_under_their_titles() -> None:
    _, head, row = Table(9000, 120).row(RECORD)
    values = {"loss": "0.5123", "lr": "4.60e-04", "tokens/s": "12,226", "memory": "22.36 GB", "left": "1:02:07"}
    for title, value in {**values, "grad norm": "0.110", "MFU": "41.2%", "time": "0:41", "epoch": "1.25"}.items():
        end = head.index(f" {title}") + len(title) + 1
        assert row[:end].endswith(f" {value}")


def test_titles_return_after_a_page_and_when_columns_change() -> None:
    table = Table(9000, 120)
    lines = [len(table.row(RECORD)) for _ in range(HEADER_EVERY + 1)]
    assert lines == [3, *[1] * (HEADER_EVERY - 1), 3]
    assert len(table.row({key: value for key, value in RECORD.items() if key != "mfu"})) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (-1, "0:00"),
        (59.6, "1:00"),
        (605, "10:05"),
        (3727, "1:02:07"),
        (90000, "25:00:00"),
        (4e5, "4d 15h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"eval_loss": 0.5, "eval_accuracy": 0.75}, "evaluation: loss 0.5000, accuracy 0.7500"),
        ({"saved_step": 4.0, "save_stall_seconds": 0.01, "save_seconds": 1.23}, "saved checkpoint-4 in 1.2 s"),
        (
            {"saved_step": 4.0, "save_stall_seconds": 2.0, "save_seconds": 3.0},
            "saved checkpoint-4 in 3.0 s, 2.0 s of which training waited",
        ),
        (
            {"components_kept": 100, "components": 1200, "components_budget": 90, "dem_penalty": 0.1},
            "pruned: 100 of 1,200 components are left, 90 may be",
        ),
        ({"records_skipped": 3.0}, "3 records left out so far, because they cannot be read"),
        ({"train_runtime": 3.0, "train_loss": 0.3}, ""),
    ],
)
def test_events(record: dict[str, Any], text: str) -> None:
    assert event_text(record) == text


def test_a_sample_is_one_line_that_tells_a_terminal_nothing() -> None:
    """A joiner, with which some scripts are written, is not a control character."""
    said = {"answer": "one\x1b[2J\n\n two\x9b", "expected": "क्\u200dष"}
    assert sample_text(2, said, 120) == "sample 2: one␛[2J two␡ (expected: क्\u200dष)"
