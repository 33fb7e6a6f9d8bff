"""Acting together on failure, where one rank takes longer than the others may wait in a collective."""

import os
import time
from datetime import timedelta

import pytest

from dora_dist.runtime.distributed import limit_collectives, together
from tests.ranks import RankError, run_ranks

PATIENCE = timedelta(minutes=5)


def one_is_slow(patience: timedelta | None) -> None:
    import torch.distributed as dist

    limit_collectives(2.0)
    with together("downloading", patience):
        if dist.get_rank() == 0:
            time.sleep(5.0)


def test_the_others_wait_for_a_download_longer_than_for_a_collective() -> None:
    run_ranks(one_is_slow, 2, PATIENCE)
    with pytest.raises(RankError, match="imed out"):
        run_ranks(one_is_slow, 2, None)


def fails_on_two_of_three() -> str:
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patched:
        patched.delattr(dist, "all_gather_object")  # needs many times what one number does
        with together("nothing"):
            pass
        with together("nothing", PATIENCE):
            pass
    try:
        with together("counting"):
            if dist.get_rank() > 0:
                raise ValueError(f"{dist.get_rank()} is too many")
    except RuntimeError as error:
        return str(error)
    except ValueError as error:
        return f"its own: {error}"
    raise AssertionError("no failure was told of")


def test_texts_are_gathered_only_where_a_rank_failed() -> None:
    of_the_first = "counting failed on rank 1: 1 is too many"
    assert run_ranks(fails_on_two_of_three, 3) == [of_the_first, "its own: 1 is too many", of_the_first]


def one_dies() -> None:
    import torch.distributed as dist

    with together("downloading", PATIENCE):
        if dist.get_rank() == 0:
            time.sleep(0.5)
            os._exit(1)


def test_they_do_not_wait_for_one_that_died() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2: Traceback[\s\S]*onnection"):
        run_ranks(one_dies, 2, timeout=120.0)
