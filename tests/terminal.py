"""A command in a real terminal: what a person sees, after scrolling back, and what keys do.

    python -m tests.terminal --columns 80 -- dora-dist train --config configs/quickstart.json

prints what is left on the screen at the end; docs/terminal/ was recorded so.
"""

import argparse
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyte

CTRL_C = b"\x03"


class Terminal:
    """`command` in a terminal that is `columns` wide."""

    def __init__(self, columns: int, command: Sequence[str], *, folder: Path | None = None, **environment: str) -> None:
        self._screen = pyte.HistoryScreen(columns, 40, history=100_000)
        self._stream = pyte.ByteStream(self._screen)
        self._columns, self.status = columns, None
        ready, go = os.pipe()  # the size must be there before the command asks for it
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            try:
                os.read(ready, 1)
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # which is ignored where tests run in the background
                os.chdir(folder or Path.cwd())
                os.execvpe(command[0], list(command), {**os.environ, "TERM": "xterm", **environment})
            finally:  # never a second pytest
                os._exit(127)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        os.write(go, b"!")
        os.close(ready)
        os.close(go)

    status: int | None

    def press(self, key: bytes) -> None:
        """Type a key."""
        os.write(self._fd, key)

    def send(self, number: int) -> None:
        """Send a signal to the command: what the terminal does with Ctrl-C to all that run in it."""
        os.kill(self._pid, number)

    def until(self, condition: Callable[[str], object], timeout: float = 300.0) -> str:
        """Wait until the text on the screen fulfils something, or the command has ended; the text."""
        deadline = time.monotonic() + timeout
        while self._read() and not condition(self.text):
            assert time.monotonic() < deadline, self.text
        return self.text

    def end(self, timeout: float = 300.0) -> int:
        """Wait for the command's end; its exit status, negative for a signal."""
        self.until(lambda text: False, timeout)
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            os.close(self._fd)
        return self.status

    @property
    def text(self) -> str:
        """Every line that can be seen, the oldest first, without what was drawn over."""
        above = ["".join(line[x].data for x in range(self._columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display]).rstrip() + "\n"

    def _read(self) -> bool:
        """Take what has come; False at the end."""
        if not select.select([self._fd], [], [], 0.1)[0]:
            return True
        try:
            arrived = os.read(self._fd, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self._stream.feed(arrived)
        return bool(arrived)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=80, help="width of the terminal (%(default)s)")
    parser.add_argument("--press-at", metavar="TEXT", help="press Ctrl-C as soon as this is seen")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    terminal = Terminal(options.columns, options.command)
    if options.press_at:
        terminal.until(lambda text: options.press_at in text, timeout=3600)
        terminal.press(CTRL_C)
    status = terminal.end(timeout=3600)
    sys.stdout.write(terminal.text)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
