"""The process group: who we are among the ranks, and acting together on success and failure."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dora_dist import launchers, rendezvous
from dora_dist.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `world_size`, `local_rank` of `local_world_size` on the node `host`."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    launcher: str
    """As `launchers.Launch` names it."""

    @property
    def first(self) -> bool:
        return self.rank == 0


def launched_world_size() -> int:
    """How many ranks the launcher started, before any process group exists; 1 without a launcher."""
    return launchers.discover(os.environ).world_size


def choose_accelerator(name: str) -> None:
    """Settle the device, before DeepSpeed is imported: "cpu", "cuda", or "auto" for a GPU where there is one.

    DS_ACCELERATOR in the environment wins. With "auto", DeepSpeed alone would take a machine that has a CUDA build
    of torch but no GPU for a GPU machine. Raises UserError for "cuda" where there is none.
    """
    if "DS_ACCELERATOR" in os.environ:
        return
    if name == "auto":
        if torch.accelerator.is_available():
            return
        name = "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise UserError(
            f'engine.accelerator = "cuda": torch finds no GPU here (torch {torch.__version__} {built}); look at '
            'CUDA_VISIBLE_DEVICES and nvidia-smi, or set it to "auto"'
        )
    os.environ["DS_ACCELERATOR"] = name


def start(timeout_s: float = 1800.0) -> World:
    """Initialise the process group of the ranks that a launcher started, or of one process alone.

    Whatever the launcher was, the same variables are set in os.environ afterwards (`launchers.OWN`). A process group
    that exists already is taken over as it is. `timeout_s`: how long a collective may take before this rank gives up
    on the others. Raises UserError where the environment contradicts itself, and when ranks do not find one another.
    """
    launch = launchers.settle()

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    # "ccl" is DeepSpeed's name for a CPU's backend, of a vendor library that is seldom there.
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    devices = 0 if on_cpu else accelerator.device_count()
    if devices and (launch.local_rank or 0) >= devices:
        os.environ["LOCAL_RANK"] = "0"  # the launcher lets each rank see one device of its own
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    cards = _form_group(launch, rendezvous.own_card(launch, backend, devices), timeout_s)
    host = cards[dist.get_rank()].host
    ranks_here = launch.local_world_size or sum(card.host == host for card in cards)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"] = str(ranks_here)  # the latter is DeepSpeed's name
    if on_cpu:
        # DeepSpeed would compile an all-reduce for inference, which nothing here uses. A process that is killed while
        # it builds or loads that leaves a lock behind, at which all later ones would wait for ever.
        deepspeed.ops.__compatible_ops__ = {}
        if "OMP_NUM_THREADS" not in os.environ:
            threads = rendezvous.core_share(cards, dist.get_rank())
            torch.set_num_threads(threads)
            os.environ["OMP_NUM_THREADS"] = str(threads)  # or accelerate would set its own, for all cores of the host
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s), verbose=False)
    return World(dist.get_rank(), dist.get_world_size(), launch.local_rank or 0, ranks_here, host, launch.launcher)


def _form_group(launch: launchers.Launch, mine: rendezvous.Card, timeout_s: float) -> list[rendezvous.Card]:
    """The process group of all ranks, whose cards are returned."""
    if dist.is_initialized():
        cards = [mine] * dist.get_world_size()
        dist.all_gather_object(cards, mine)
        rendezvous.check(cards)
        return cards
    store, cards = rendezvous.meet(launch, mine, timeout_s)
    rendezvous.check(cards)
    rendezvous.choose_interface(cards, launch)
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(
            mine.backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
        )
    except RuntimeError as error:
        raise UserError(rendezvous.unreachable(cards, launch, str(error).split("\n")[0])) from error
    return cards


def stop() -> None:
    """Leave the process group; harmless without one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shorten_timeout(timeout_s: float) -> None:
    """From now on a collective that takes longer than this is an error: set once the slow start is over."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), dist.distributed_c10d._get_default_group())


@contextmanager
def together(what: str, patience: timedelta | None = None) -> Iterator[None]:
    """Run a block without collectives on every rank; if it raises anywhere, every rank raises.

    A rank that failed alone would leave the others waiting in their next collective. The error names the ranks.
    `patience`: how long ranks wait for the slowest, for a block that may take longer than a collective; one that dies
    is noticed at once. Raises UserError on all ranks if the failure was one anywhere, else RuntimeError.
    """
    # gloo whatever the backend is: its connections break with the process at their other end.
    waiting = dist.new_group(backend="gloo", timeout=patience) if patience and dist.get_world_size() > 1 else None
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
    dist.all_gather_object(found, mine, group=waiting)
    if waiting is not None:
        dist.destroy_process_group(waiting)
    failed = {rank: text for rank, text in enumerate(found) if text is not None}
    if not failed:
        return
    if failure is not None and dist.get_rank() == min(failed):
        raise failure
    rank, (text, users) = min(failed.items())
    where = "every rank" if len(failed) == len(found) else f"rank {rank}"
    raise (UserError if users else RuntimeError)(f"{what} failed on {where}: {text}") from failure
