"""Records of a stream that are left out while a run trains: how many may be, and what is said of them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from dora_dist.data.stream import Problem
from dora_dist.runtime.distributed import World
from dora_dist.runtime.errors import UserError
from dora_dist.training.unreadable import COUNTS, Unreadable

SHORT = Problem("a.jsonl, line 7: has no token to learn from", "data.cutoff_len")


@pytest.fixture
def unreadable() -> Iterator[Unreadable]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Unreadable([], {"data.bad_images": "skip", "data.bad_records": "skip"}, World(0, 1, 0, 1, "here", "none"))
    dist.destroy_process_group()


def step(unreadable: Unreadable, batch: int, problems: list[Problem | str]) -> None:
    """As the trainer does after each step."""
    unreadable.problems += problems
    unreadable.read(batch)
    if unreadable.any:
        unreadable.settle()


def test_a_stream_of_which_nothing_is_learnt_ends_the_run(unreadable: Unreadable) -> None:
    for _ in range(3):
        step(unreadable, 20, [SHORT] * 20)
        step(unreadable, 20, [SHORT] * 20)
        step(unreadable, 20, [])  # something is learnt again
    for _ in range(4):
        step(unreadable, 20, [SHORT] * 20)
    with pytest.raises(UserError, match="of the last 100 records none could be learnt from.*data.cutoff_len.*line 7"):
        step(unreadable, 20, [SHORT] * 20)


def test_many_records_without_a_token_to_learn_from_are_warned_of_once(
    unreadable: Unreadable, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(9):
        step(unreadable, 20, [SHORT] * 3)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("have no token to learn from; raise data.cutoff_len") == 1
    assert "data.train: 12 of 80 records have no token" in said


def test_a_run_that_is_resumed_counts_on_where_it_was(unreadable: Unreadable) -> None:
    bad = Problem("a.jsonl, line 7 is not JSON", "data.bad_records")
    for _ in range(10):
        step(unreadable, 100, [bad])
    kept: dict[str, Any] = json.loads(json.dumps({COUNTS: unreadable.counts}))
    unreadable.go_on({})  # of an earlier version
    assert unreadable.counts["read"] == 0
    with pytest.raises(UserError, match="data.train: 20 of 100 records cannot be used"):
        step(unreadable, 100, [bad] * 20)
    unreadable.go_on(kept)
    unreadable.problems += [bad] * 20  # 30 of 1,100 are few
    unreadable.read(100)
    assert unreadable.settle() == {"records_skipped": 30.0}
    with pytest.raises(UserError, match="data.train: 121 of 1,200 records cannot be used"):
        step(unreadable, 100, [bad] * 91)


def test_pictures_left_out_of_a_set_that_is_no_stream_end_nothing(unreadable: Unreadable) -> None:
    for _ in range(200):
        step(unreadable, 1, ["a.png is missing"])
