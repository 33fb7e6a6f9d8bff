"""How commands that compute something in one process end: their output's reader gone, or asked to stop."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dora_dist.errors import Stopped


def say(text: str) -> None:
    """Print an answer. A reader that has gone (`| head -1`) does not end the command."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # what is still in the buffer would break again at the end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM raises Stopped inside, so that what is half-written is removed, as with Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(f"{signal.Signals(number).name}: nothing was written")
