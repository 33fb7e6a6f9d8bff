"""Stopping when asked: what schedulers send before they take the machines away.

SIGTERM (preemption, a launcher that ends the job) and SIGUSR1 (a time limit is near; sbatch --signal) ask a run to
stop. A rank that is asked only takes note. All ranks agree on it at the next optimizer step, save, and end.
"""

import signal
import threading
from types import FrameType

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
