"""A training job of real processes, without a launcher that would end ranks by itself: they are killed here."""

import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dora_dist.runtime.console import complain
from tests.ranks import ON_CPU, context

_HANGS = "the main thread hangs here"


class Job:
    """`dora-dist train ARGUMENTS` on `world_size` ranks that meet at a free port; each rank's output goes to a file."""

    def __init__(self, folder: Path, world_size: int, *arguments: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
        port = _free_port()
        self.ranks: list[BaseProcess] = []
        words = [str(word) for word in arguments]
        with patch.dict(os.environ, ON_CPU):
            for rank, log in enumerate(self.logs):
                environment = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "GLOO_SOCKET_IFNAME": "lo",
                }
                process = context().Process(target=_main, args=(environment, log, words))
                process.start()
                self.ranks.append(process)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def hang(self, rank: int) -> None:
        """Have a rank's main thread wait outside of Python for ever, as for a device; its other threads go on."""
        self.send(rank, signal.SIGUSR2)
        self.until(lambda: _HANGS in self.said(rank))

    def codes(self, timeout: float = 120.0) -> list[int | None]:
        """Every rank's exit status once all have ended; as `Process.exitcode`, so -9 for a rank that was killed."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        assert all(process.exitcode is not None for process in self.ranks), f"not ended:\n{self.output()}"
        return [process.exitcode for process in self.ranks]

    def until(self, condition: Callable[..., Any], timeout: float = 120.0) -> None:
        """Wait for something that the job is to bring about."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline and any(p.is_alive() for p in self.ranks), self.output()
            time.sleep(0.005)

    def output(self) -> str:
        """What all ranks have printed."""
        return "\n".join(f"--- rank {rank}\n{self.said(rank)}" for rank in range(len(self.logs)))

    def said(self, rank: int) -> str:
        """What one rank has printed."""
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""


def _main(environment: dict[str, str], log: Path, arguments: list[str]) -> None:
    gc.freeze()  # as in tests/ranks.py
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    from dora_dist.cli import run

    signal.signal(signal.SIGUSR2, _hang)
    for number in (signal.SIGINT, signal.SIGHUP):  # which are ignored where tests run in the background
        signal.signal(number, signal.SIG_DFL)
    run(["train", *arguments])


def _hang(*_: object) -> None:
    complain(_HANGS)  # past the run's log
    while True:
        ctypes.CDLL(None).sleep(1000)


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
