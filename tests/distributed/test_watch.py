"""A rank that fails alone: the others end, also from inside a collective, and know why."""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dora_dist.runtime import distributed
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.exit_codes import FAILED, USERS_MISTAKE
from dora_dist.runtime.watch import FAREWELL_S, Watch
from tests import toy
from tests.distributed import training_runs
from tests.ranks import RankError, run_ranks


def fail_alone(error: type[Exception]) -> None:
    """Rank 1 raises; rank 0 waits for it in a collective that can only break by a timeout."""
    import torch.distributed as dist

    world = distributed.start()
    with Watch(world):
        if world.rank == 1:
            raise error("of rank 1")
        dist.barrier()


@pytest.mark.parametrize(("error", "code"), [(ZeroDivisionError, FAILED), (UserError, USERS_MISTAKE)])
def test_a_rank_stuck_in_a_collective_ends_with_the_status_of_the_cause(error: type[Exception], code: int) -> None:
    with pytest.raises(RankError) as found:
        run_ranks(fail_alone, 2, error)
    assert f"rank 0 of 2: died with exit code {code}" in str(found.value)
    assert f"{error.__name__}: of rank 1" in str(found.value)


def end_well() -> None:
    world = distributed.start()
    for _ in range(2):  # what the first leaves in the store is not taken for the second's
        with pytest.raises(UserError), Watch(world):
            raise UserError("on every rank")
    with Watch(world):
        time.sleep(0.1 if world.first else FAREWELL_S / 5)


def test_an_error_on_all_ranks_is_each_ones_own_and_the_next_watch_starts_anew() -> None:
    run_ranks(end_well, 2)


def wait_alone_in_each_group() -> list[str]:
    """What rank 0 is told by collectives that rank 1 never enters, in torch's group and in hpZ's inside a node."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups

    world = distributed.start()
    groups._create_zero_param_parallel_group(2)
    of_ours = dist.new_group(timeout=timedelta(seconds=100), group_desc="saving")
    distributed.limit_collectives(1.5)
    assert of_ours not in distributed.training_groups()
    said = []
    for group in (dist.group.WORLD, groups._get_zero_param_intra_parallel_group()):
        if world.first:
            with pytest.raises(RuntimeError) as found:
                dist.all_reduce(torch.ones(1), group=group)
            said.append(str(found.value))
    store = dist.distributed_c10d._get_default_store()
    if world.first:
        store.set("done", "")
    store.wait(["done"])
    return said


def test_groups_that_deepspeed_makes_have_the_timeout_of_a_step_too() -> None:
    said, _ = run_ranks(wait_alone_in_each_group, 2)
    assert len(said) == 2 and all("1500ms" in text for text in said), said


def collectives_of(configuration: dict[str, Any]) -> int:
    """How many collectives this rank's main thread has entered after a run."""
    import torch.distributed as dist

    from dora_dist.runtime.signs import collectives_entered

    training_runs.run(configuration)
    entered = collectives_entered()
    dist.barrier()  # the other ranks may still be asking
    return entered


def test_all_ranks_of_a_run_enter_as_many_collectives(tmp_path: Path) -> None:
    """Who hangs is judged by it. The run saves, evaluates, and has hpZ's groups besides torch's and DeepSpeed's."""
    toy.training_folder(tmp_path)
    training = {"max_steps": 2, "eval_every": 1}
    configuration = training_runs.config(
        tmp_path / "base",
        tmp_path / "data.json",
        tmp_path / "run",
        training=training,
        checkpoint={"save_every": 1},
        engine={"hpz_partition_size": 2},
    )
    entered = run_ranks(collectives_of, 2, configuration)
    assert entered[0] == entered[1] > 100


def threads() -> int:
    import torch
    from accelerate.state import PartialState

    del os.environ["OMP_NUM_THREADS"]
    distributed.start()
    PartialState(cpu=True)
    return torch.get_num_threads()


def test_ranks_share_the_cores_of_their_host_whatever_accelerate_thinks() -> None:
    cores = len(os.sched_getaffinity(0))
    assert run_ranks(threads, 2) == [max(1, cores // 2)] * 2
