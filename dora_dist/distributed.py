"""The process group: who we are among the ranks, and acting together on success and failure."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dora_dist.errors import UserError

_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `world_size`, `local_rank` on its node."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def first(self) -> bool:
        return self.rank == 0


def launched_world_size() -> int:
    """How many ranks the launcher started, before any process group exists; 1 without a launcher."""
    for variable in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if variable in os.environ:
            return int(os.environ[variable])
    return 1


def choose_accelerator(name: str) -> None:
    """Settle the device, before DeepSpeed is imported: "cpu", "cuda", or "auto" for a GPU where there is one.

    DS_ACCELERATOR in the environment wins. With "auto", DeepSpeed alone would take a machine that has a CUDA build
    of torch but no GPU for a GPU machine.
    """
    if name == "auto":
        if torch.accelerator.is_available():
            return
        name = "cpu"
    os.environ.setdefault("DS_ACCELERATOR", name)


def start(timeout_s: float = 1800.0) -> World:
    """Initialise the process group as the launcher set it up (deepspeed, torchrun, mpirun), or one process alone.

    `timeout_s`: how long a collective may take before this rank gives up on the others.
    """
    if launched_world_size() == 1 and "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:
        os.environ.update({key: os.environ.get(key, value) for key, value in _ALONE.items()})
        os.environ.setdefault("MASTER_PORT", str(_free_port()))

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # "ccl" is DeepSpeed's name for a CPU's backend, of a vendor library that is seldom there. A group that exists
    # already is taken over as it is.
    on_cpu = get_accelerator().device_name() == "cpu"
    backend = "gloo" if on_cpu else get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s), verbose=False)
    if on_cpu:
        _share_cores()
    local_rank = int(os.environ["LOCAL_RANK"])
    get_accelerator().set_device(local_rank)
    return World(dist.get_rank(), dist.get_world_size(), local_rank)


def stop() -> None:
    """Leave the process group; harmless without one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shorten_timeout(timeout_s: float) -> None:
    """From now on a collective that takes longer than this is an error: set once the slow start is over."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), dist.distributed_c10d._get_default_group())


@contextmanager
def together(what: str) -> Iterator[None]:
    """Run a block without collectives on every rank; if it raises anywhere, every rank raises.

    A rank that failed alone would leave the others waiting in their next collective. The error names the ranks.
    Raises UserError on all ranks if the failure was one anywhere, else RuntimeError.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # re-raised below, on every rank
        failure = error
    if dist.get_world_size() == 1:
        if failure is not None:
            raise failure
        return
    found: list[tuple[str, bool] | None] = [None] * dist.get_world_size()
    mine = None if failure is None else (str(failure), isinstance(failure, UserError | OSError))
    dist.all_gather_object(found, mine)
    failed = {rank: text for rank, text in enumerate(found) if text is not None}
    if not failed:
        return
    if failure is not None and dist.get_rank() == min(failed):
        raise failure
    rank, (text, users) = min(failed.items())
    where = "every rank" if len(failed) == len(found) else f"rank {rank}"
    raise (UserError if users else RuntimeError)(f"{what} failed on {where}: {text}") from failure


def _share_cores() -> None:
    """Give each rank of a node its part of the cores: ranks that all use all of them slow each other down."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    # torchrun, DeepSpeed's launcher and Open MPI each have a name for it.
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
    ranks_here = next((int(os.environ[name]) for name in names if name in os.environ), 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
