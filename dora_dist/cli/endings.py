"""How commands that compute something in one process end when they are asked to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dora_dist.runtime.errors import Stopped


@contextmanager
def ended_by_signals(left: str = "nothing was written") -> Iterator[None]:
    """SIGTERM raises Stopped inside, so that unfinished files are removed, as with Ctrl-C; `left` says what remains."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"{signal.Signals(number).name}: {left}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
