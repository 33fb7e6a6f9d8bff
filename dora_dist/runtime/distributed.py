"""The process group: this rank's place in it, limits and errors of collectives, and failing on all ranks together."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dora_dist.runtime import launchers, rendezvous
from dora_dist.runtime.errors import FailedAlone, UserError


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

    DS_ACCELERATOR in the environment wins. "auto" is decided here because DeepSpeed would choose CUDA wherever torch
    is built for it, also on a machine without a GPU. Raises UserError for "cuda" where there is no GPU, and for a
    `name` that the environment contradicts.
    """
    if found := os.environ.get("DS_ACCELERATOR"):
        if name not in ("auto", found):
            raise UserError(
                f'engine.accelerator = "{name}": the environment says DS_ACCELERATOR={found}, which DeepSpeed follows; '
                'unset that, or set engine.accelerator to "auto"'
            )
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


def check_attention(implementation: str) -> None:
    """Raise UserError for an attention implementation whose package is not installed here."""
    packages = ("flash_attn", "kernels")  # the latter fetches the same code from the hub
    if implementation == "flash_attention_2" and not any(map(importlib.util.find_spec, packages)):
        raise UserError(
            'model.attn_implementation = "flash_attention_2": its package is not installed; `pip install flash-attn`, '
            'or set it to "sdpa"'
        )


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
        # DeepSpeed would compile its shared-memory all-reduce for inference, which nothing here uses. A process that is
        # killed while it compiles leaves a lock file behind, and every later run would wait for it for ever.
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


def training_groups() -> list[Any]:
    """Process groups of this rank that the main thread uses: torch's default one and those that DeepSpeed makes.

    This package's own groups for work in the background (checkpoints) have another description and their own timeouts.
    """
    groups = list(dist.distributed_c10d._world.pg_map)
    return [group for group in groups if group.group_desc in ("default_pg", "undefined")]


def limit_collectives(timeout_s: float) -> None:
    """From now on a collective that takes longer than this is an error, in all of `training_groups`.

    DeepSpeed makes its groups (data parallelism, and hpZ's inside a node) without a timeout, so they have torch's
    default: 30 minutes with gloo, 10 with NCCL. (hpZ: hierarchical partitioning, see engine.hpz_partition_size.)
    """
    for group in training_groups():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def broken_collective() -> str | None:
    """The error that NCCL's watchdog recorded for a collective, which raises nothing: "TIMEOUT", "COMM_ERROR", ..."""
    for group in training_groups():
        for device in group._device_types:
            backend = group._get_backend(device)
            # gloo keeps no such record, because its collectives raise.
            if hasattr(backend, "get_error") and backend.get_error().name != "SUCCESS":
                return str(backend.get_error().name)
    return None


def leave_nccl_errors_to_the_watch() -> None:
    """Have NCCL's errors end a run through `Watch`, with a reason and its exit code (before any process group exists).

    By default torch's NCCL watchdog ends the process with SIGABRT and a C++ stack when a peer is gone or a collective
    times out (TORCH_NCCL_ASYNC_ERROR_HANDLING=3; torchrun sets 1). Modes 1 and 2 abort the communicator first: kernels
    return with partial results, and the main thread would continue with them. With 0 the main thread stays blocked in
    the failed kernel, the error can be read (`broken_collective`), and the watch says which rank is lost.
    With TORCH_NCCL_DUMP_ON_TIMEOUT the first rank that sees an error would have the monitor threads of all ranks dump
    their state and end their processes. With TORCH_NCCL_ENABLE_MONITORING a monitor thread ends a process whose
    watchdog makes no progress for 8 minutes, which can also mean that its device is busy. What a user has set stays.
    """
    if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1") == "1":  # torchrun's, not the user's
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")


@contextmanager
def together(what: str, patience: timedelta | None = None) -> Iterator[None]:
    """Run a block without collectives on every rank; if it raises anywhere, every rank raises.

    If one rank failed alone, the others would wait for it in their next collective. The error names the rank.
    `patience`: how long ranks wait for the slowest, where the block may take longer than a collective may, or has
    collectives itself; a rank that dies is noticed at once. Raises UserError on all ranks if the first failed rank
    raised one (or an OSError), else RuntimeError; FailedAlone on a rank that failed and that the others do not join.
    """
    # gloo, whatever the backend is: its connections break when the process at the other end dies.
    waiting = dist.new_group(backend="gloo", timeout=patience) if patience and dist.get_world_size() > 1 else None
    failure: Exception | None = None
    try:
        yield
    except OSError as error:
        failure = UserError(f"{what} failed: {error}")
        failure.__cause__ = error
    except Exception as error:  # re-raised below, on every rank
        failure = error
    if dist.get_world_size() == 1:
        if failure is not None:
            raise failure
        return
    try:
        failed = _failures(failure, waiting)
    except RuntimeError:  # they are in another collective, and wait for this rank there
        if failure is None:
            raise
        raise FailedAlone(f"{what} failed, on this rank alone: {failure}") from failure
    if waiting is not None:
        dist.destroy_process_group(waiting)
    if not failed:
        return
    if failure is not None and dist.get_rank() == min(failed):
        raise failure
    rank, (text, users) = min(failed.items())
    where = "every rank" if len(failed) == dist.get_world_size() else f"rank {rank}"
    raise (UserError if users else RuntimeError)(f"{what} failed on {where}: {text}") from failure


def _failures(mine: Exception | None, group: Any) -> dict[int, tuple[str, bool]]:
    """Of each rank that failed the text, and whether it is a UserError (collective).

    Texts are gathered where there are any: usually one number says that there are none.
    """
    asked: Any = group or dist.group.WORLD
    devices, cpu = asked._device_types, torch.device("cpu")
    any_failed = torch.tensor(int(mine is not None), device=cpu if cpu in devices else devices[0])
    dist.all_reduce(any_failed, op=dist.ReduceOp.MAX, group=group)
    if not any_failed.item():
        return {}
    found: list[tuple[str, bool] | None] = [None] * dist.get_world_size()
    text = None if mine is None else (str(mine), isinstance(mine, UserError))
    dist.all_gather_object(found, text, group=group)
    return {rank: text for rank, text in enumerate(found) if text is not None}
