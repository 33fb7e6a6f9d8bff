"""Stopping when asked: by a scheduler that takes the machines away, or by a person.

SIGTERM (preemption, a launcher that ends the job), SIGUSR1 (a time limit is near; sbatch --signal), SIGINT (Ctrl-C)
and SIGHUP (a closed terminal; not under nohup) ask a run to stop. The handler only records the signal. At the next
optimizer step, or the next batch of an evaluation, all ranks agree to stop, save, and end. A second Ctrl-C ends the
process at once.
"""

import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from dora_dist.runtime.console import say
from dora_dist.runtime.errors import LostRank, Stopped, UserError
from dora_dist.runtime.exit_codes import INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
SAME_PRESS_S = 1.0
"""SIGINTs within this time are one Ctrl-C: the terminal sends it to all processes, and a launcher may send it again."""


class StopRequest:
    """Handles the signals inside its context (in the main thread, the only one where Python can). Repeated signals
    change nothing, except a second Ctrl-C, which ends the process, whatever it is doing.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """The signal that asked this process to stop."""
        self.can_save = False
        """Set once training has begun. Until then a signal raises Stopped at once."""

    def __enter__(self) -> "StopRequest":
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        # Python runs handlers only when the main thread returns from C++, which may be in a collective for minutes. The
        # wake-up descriptor gets the numbers of signals at once.
        self._arrivals, sender = socket.socketpair()
        sender.setblocking(False)
        self._sender, self._wakeup_before = sender, signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
            self._sender.close()  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            return
        self.signal = signal.Signals(number).name
        # The launcher ends all ranks when the first has ended with an error: this one is about to say its own.
        ended_already = isinstance(sys.exc_info()[1], UserError | LostRank)
        if not self.can_save and not ended_already:
            raise Stopped(f"{self.signal} before the first step: there was nothing to save")

    def _listen(self) -> None:
        pressed: float | None = None
        while arrived := self._arrivals.recv(64):
            if signal.SIGINT not in arrived:
                continue
            if pressed is None:
                pressed = time.monotonic()
                if self.can_save:
                    say("\nCtrl-C: saving after this step, then ending. Press it again to end at once, without saving.")
            elif time.monotonic() - pressed > SAME_PRESS_S:
                os._exit(INTERRUPTED)
        self._arrivals.close()


class EvaluationStopped(Exception):
    """All ranks left an evaluation at the same batch, because one of them was asked to stop."""


class StopTogether:
    """Lets all ranks learn at the same batch that one of them was asked to stop, without waiting for a device.

    The ranks exchange the answer in the background, over gloo. Each batch reads the exchange that the batch before has
    started, so that no batch waits for the device or for a slower rank. Made, asked and closed by all ranks
    (collective).
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
        """Wait for the exchange that is under way. A rank asked after the last batch is heard at the next step."""
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None

    def close(self) -> None:
        """Let go of the process group."""
        dist.destroy_process_group(self._group)
