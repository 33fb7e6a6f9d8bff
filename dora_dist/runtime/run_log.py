"""The run's log, RUN_DIR/run.log: whatever any rank prints while a run lives, its libraries included."""

import io
import os
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dora_dist.runtime.console import STREAMS, Lasting, complain, warn
from dora_dist.runtime.errors import LostRank, Stopped, UserError

_EXPECTED = (UserError, LostRank, Stopped, KeyboardInterrupt)
_SHOWN_OF_A_LOST_LOG = 4000  # bytes


class RunLog:
    """Inside its context, whatever this process prints goes into the log: Python's lines, C++'s, child processes'.

    What `console` says reaches the terminal, and the log as well. Before the run has a folder, the log is a file
    without a name; `move_into` makes it one of the folder. Each line is one write to a file that is open for
    appending, so that the ranks of a node can share it. If an unexpected exception leaves the context before
    the log has a name, the log's end is shown.
    """

    def __init__(self, rank: int) -> None:
        self.path: Path | None = None
        self._rank, self._lock = rank, threading.Lock()

    def __enter__(self) -> "RunLog":
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)
        self._streams = sys.stdout, sys.stderr
        self._apart = [_apart(stream, fd) for fd, stream in enumerate(self._streams, 1)]
        self._saved = [os.dup(fd) for fd in (1, 2)]
        self._divert()
        sys.stdout, sys.stderr = (_Lines(self, stream) for stream in self._streams)
        STREAMS.apart, STREAMS.copy = (Lasting(self._apart[0]), Lasting(self._apart[1])), self.write
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.write("".join(traceback.format_exception(error)))
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError):
                stream.close()
        sys.stdout, sys.stderr = self._streams
        for stream, own in zip(self._apart, self._streams, strict=True):
            if stream is not own:
                with suppress(OSError, ValueError):  # what could not be written
                    stream.close()
        STREAMS.apart, STREAMS.log, STREAMS.copy = None, None, lambda text: None
        for fd, saved in enumerate(self._saved, 1):
            os.dup2(saved, fd)
            os.close(saved)
        if error is not None and not isinstance(error, _EXPECTED) and self.path is None:
            self._file.seek(max(0, self._file.tell() - _SHOWN_OF_A_LOST_LOG))
            complain(self._file.read().decode(errors="replace"))
        self._file.close()

    def move_into(self, path: Path) -> None:
        """Go on in the file `path`, after what is there and what has been logged so far."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            target = path.open("ab", buffering=0)
        except OSError as error:
            warn(f"{path} cannot be written ({error.strerror}): what libraries print is lost")
            return
        with self._lock:
            before, self._file, self.path, STREAMS.log = self._file, target, path, path
            with suppress(OSError):  # a full disk must not end a run by its log
                target.write(os.pread(before.fileno(), os.fstat(before.fileno()).st_size, 0))
            self._divert()
        before.close()

    def write(self, text: str) -> None:
        """Add lines, each with the time and the rank. Of a line that was drawn over, only what it showed last."""
        head = f"{time.strftime('%H:%M:%S')} [rank {self._rank}] "
        lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
        block = "".join(f"{head}{line}\n" for line in lines if line.strip())
        with suppress(OSError, ValueError), self._lock:
            os.write(self._file.fileno(), block.encode(errors="replace"))

    def _divert(self) -> None:
        for fd in (1, 2):
            os.dup2(self._file.fileno(), fd)


def _apart(stream: Any, fd: int) -> Any:
    """What a standard stream writes to, for use while its file descriptor is diverted."""
    with suppress(OSError, ValueError, AttributeError):
        stream.flush()
        if stream.fileno() == fd:
            return open(os.dup(fd), "w", encoding="utf-8", errors="replace")
    return stream


class _Lines(io.TextIOBase):
    """A standard stream inside a run. A library's log handler may keep it longer: it then writes to the stream that it
    replaced.
    """

    def __init__(self, log: RunLog, before: Any) -> None:
        self._log: RunLog | None = log
        self._before, self._begun = before, ""

    def write(self, text: str) -> int:
        if self._log is None:
            return Lasting(self._before).write(text)
        complete, newline, begun = (self._begun + text).rpartition("\n")
        self._begun = begun[-100_000:]
        if newline:
            self._log.write(complete)
        return len(text)

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if self._log is not None:
            self._log.write(self._begun)
        self._log = None
