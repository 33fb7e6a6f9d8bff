"""Runs a function on real ranks: `run_ranks(function, world_size, *args)` returns every rank's result.

Each rank is a process of its own with the environment that a launcher would give it and a gloo process group. Ranks
are forked from a server process that has imported everything, which saves each of them seconds.
Ranks that cannot start, fail, die or hang are an error here, never a skip.
"""

import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

IMPORTED = ["torch", "deepspeed", "transformers.trainer", "dora_dist.cli", "dora_dist.training.trainer"]
IMPORTED += ["deepspeed.runtime.zero.muon.original_muon", "matplotlib.figure", "scipy.stats", "sklearn.metrics"]  # late
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
GRACE_SECONDS = 2.0  # after a first failure: time for the other ranks to say what they saw


class RankError(RuntimeError):
    """Some rank failed; the message holds every failed rank's traceback or cause of death."""


def context() -> ForkServerContext:
    """Where processes come from that need not import `IMPORTED` any more."""
    found = get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    return found


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call `function(*args)` on `world_size` CPU ranks at once and return their results in rank order.

    `function` is a module-level function; arguments and results are pickled. The gloo group is ready when it
    is called, so `deepspeed.init_distributed` finds it. Raises RankError when a rank raises or dies, or when
    they are not all done after `timeout` seconds. No process outlives the call.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[BaseProcess] = []
        pipes: list[Connection] = []
        try:
            for rank in range(world_size):
                receiver, sender = context().Pipe(duplex=False)
                process: BaseProcess = context().Process(
                    target=_rank_main, args=(rank, world_size, folder, sender, timeout, function, args)
                )
                with patch.dict(os.environ, ON_CPU):  # for the server, which starts with the first rank
                    process.start()
                sender.close()
                ranks.append(process)
                pipes.append(receiver)
            return _collect(ranks, pipes, Path(folder), timeout)
        finally:
            for process in ranks:
                _kill(process)
            for receiver in pipes:
                receiver.close()


def _environment(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # never bound: the file store is the meeting point, so ports cannot clash
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(_threads(world_size)),
        **ON_CPU,
    }


def _threads(world_size: int) -> int:
    return max(1, (os.cpu_count() or 1) // world_size)


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    sender: Connection,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    gc.freeze()  # what was imported before the fork: each engine collects garbage, which would look at all of it
    os.environ.update(_environment(rank, world_size))
    os.setsid()  # its own process group: whatever it starts can be killed with it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with open(f"{folder}/stack-{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, stack)
        try:
            from datetime import timedelta

            import deepspeed
            import torch
            import torch.distributed as dist

            # Else its first rank here compiles an all-reduce, and one that is killed meanwhile stops all later ones:
            # they wait for its lock file. dora_dist.runtime.distributed.start does the same.
            deepspeed.ops.__compatible_ops__ = {}
            torch.set_num_threads(_threads(world_size))  # OMP_NUM_THREADS came after torch
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            outcome = pickle.dumps((True, function(*args)))
            gc.collect()  # engines hold groups in reference cycles; a group left to the interpreter's end can abort it
            dist.destroy_process_group()
        except BaseException:  # SystemExit of a command line under test counts as well
            outcome = pickle.dumps((False, traceback.format_exc()))
        # Plain bytes: a tensor sent as an object would live in shared memory that dies with this process.
        sender.send_bytes(outcome)
        faulthandler.unregister(signal.SIGUSR1)
    # Threads that libraries leave behind may ask for the interpreter while it ends, which now and then aborts the
    # process ("terminate called without an active exception"). What a rank had to show is shown by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _collect(ranks: list[BaseProcess], pipes: list[Connection], folder: Path, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending = dict(enumerate(pipes))
    deadline = time.monotonic() + timeout
    while pending:
        ready = wait(list(pending.values()), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
            try:
                succeeded, outcome = pickle.loads(pending.pop(rank).recv_bytes())
            except EOFError:
                ranks[rank].join(GRACE_SECONDS)
                succeeded, outcome = False, f"died with exit code {ranks[rank].exitcode} and no result"
            (results if succeeded else failures)[rank] = outcome
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    for rank, process in enumerate(ranks):
        process.join(max(0.0, deadline - time.monotonic()))
        if rank in results and process.exitcode != 0:
            failures[rank] = f"returned, then ended with exit code {process.exitcode} (None: still running)"
    if pending and not failures:
        failures = {rank: f"not done after {timeout:g} s\n{_stack(ranks[rank], folder, rank)}" for rank in pending}
    if failures:
        text = "\n".join(f"--- rank {rank} of {len(ranks)}: {cause}" for rank, cause in failures.items())
        raise RankError(f"{len(failures)} of {len(ranks)} ranks failed\n{text}")
    return [results[rank] for rank in range(len(ranks))]


def _stack(process: BaseProcess, folder: Path, rank: int) -> str:
    """Where a hanging rank stands, as it writes it on SIGUSR1."""
    path = folder / f"stack-{rank}"
    if process.pid is None or not path.exists():
        return "(it had not started yet)"
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    return path.read_text()


def _kill(process: BaseProcess) -> None:
    assert process.pid is not None
    process.kill()
    process.join()
    with suppress(ProcessLookupError):  # what the rank itself started
        os.killpg(process.pid, signal.SIGKILL)
