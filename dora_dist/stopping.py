"""Stopping when asked: what schedulers send before they take the machines away.

SIGTERM (preemption, a launcher that ends the job) and SIGUSR1 (a time limit is near; sbatch --signal) ask a run to
stop. A rank that is asked only takes note. All ranks agree on it at the next optimizer step, or at the next batch of an
evaluation, save, and end.
"""

import signal
import threading
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from dora_dist.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Listens inside its context (in the main thread, where Python hears signals). Repeated signals change nothing."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """The signal that asked this process to stop."""
        self.can_save = False
        """Set once training has begun. Until then a signal raises Stopped at once."""

    def __enter__(self) -> "StopRequest":
        in_main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS if in_main}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if not self.can_save:
            raise Stopped(f"{self.signal} before the first step: there was nothing to save")


class EvaluationStopped(Exception):
    """An evaluation was left at the same batch on all ranks, because one of them was asked to stop."""


class StopTogether:
    """Lets all ranks learn at the same batch that one of them was asked to stop, without waiting for a device.

    A batch's answer is that of the batch before: by then the ranks have exchanged it in the background, over gloo, so
    that neither the device nor a slower rank is waited for. Made, asked and closed by all ranks (collective).
    """

    def __init__(self, stop: StopRequest, timeout_s: float) -> None:
        self._stop = stop
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s), group_desc="stopping")
        self._anyone = torch.zeros(1, dtype=torch.int32)
        self._exchange: dist.Work | None = None

    def check(self) -> None:
        """Before each batch. Raises EvaluationStopped, on every rank, if any was asked before the last batch."""
        self.finish()
        if self._anyone.item():
            raise EvaluationStopped
        self._anyone.fill_(self._stop.signal is not None)
        self._exchange = dist.all_reduce(self._anyone, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def finish(self) -> None:
        """Wait for the exchange that is under way. One that was asked after its last batch stops at the next step."""
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None

    def close(self) -> None:
        """Let go of the process group."""
        dist.destroy_process_group(self._group)
