"""Who is lost and who hangs, from signs alone. With real ranks: tests/distributed and tests/launch."""

from dora_dist.runtime.signs import Sign
from dora_dist.runtime.watch import Judge


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
