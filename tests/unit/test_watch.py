"""Who is lost and who hangs, from signs alone. With real ranks: tests/distributed and tests/launch."""

import os
import threading

import pytest

from dora_dist.runtime import watch
from dora_dist.runtime.distributed import World
from dora_dist.runtime.exit_codes import LOST_RANK
from dora_dist.runtime.signs import Reason, Sign
from dora_dist.runtime.watch import Judge, Watch


def signs(*numbers_and_collectives: tuple[int, int]) -> dict[int, Sign]:
    return {rank: Sign("a", 1, *given) for rank, given in enumerate(numbers_and_collectives)}


def test_a_rank_without_a_fresh_sign_is_lost_whatever_the_others_do() -> None:
    judge = Judge(2)
    for look in range(4):
        judge.look(signs((look, look), (7, 3)))
    assert judge.lost(3) == [1] and judge.lost(4) == []
    judge.look(signs((4, 4), (8, 3)))
    assert judge.lost(1) == []


def test_a_rank_that_never_gave_a_sign_is_lost_too() -> None:
    judge = Judge(2)
    for look in range(3):
        judge.look(signs((look, 0)))
    assert judge.lost(3) == [1]


def test_those_that_entered_the_fewest_collectives_hang_once_no_rank_comes_further() -> None:
    judge = Judge(3)
    for look in range(4):
        judge.look(signs((look, 5), (look, 4), (look, 5)))
    assert judge.hanging(3) == [1] and judge.hanging(4) == [] and judge.lost(1) == []
    judge.look(signs((4, 6), (4, 4), (4, 5)))  # one came further: what the others do may take its time
    assert judge.hanging(1) == []


def test_ranks_that_are_equally_far_do_not_wait_for_each_other() -> None:
    """They compute something long without collectives, each for itself; a broken collective shows otherwise."""
    judge = Judge(2)
    for look in range(9):
        judge.look(signs((look, 5), (look, 5)))
    assert judge.hanging(2) == []


def test_a_rank_that_is_ended_saves_first_and_waits_for_no_history_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str | int] = []
    hangs = threading.Event()

    def told(text: str) -> None:
        happened.append(text)
        hangs.wait()

    monkeypatch.setattr(watch, "TELLING_S", 0.1)
    monkeypatch.setattr(os, "_exit", happened.append)
    ending = Watch(World(0, 1, 0, 1, "here", "none"), told=told)
    ending.before_exit = lambda: happened.append("saved")
    thread = threading.Thread(target=ending._end, args=(Reason(1, LOST_RANK, "lost rank 1"), False), daemon=True)
    thread.start()
    thread.join(60.0)
    assert happened == ["saved", "lost rank 1", LOST_RANK]
    hangs.set()
