"""What a person sees: lines and progress bars of rank 0. While a run lives, `run_log` takes everything else."""

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dora_dist.runtime.launchers import rank_among_several

PLAIN_WIDTH = 120
"""Columns where the output is not a terminal's."""
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | dict.fromkeys(range(127, 160), 0x2421)


class Lasting:
    """A stream that may go away or fill up while a run lives: `| head -1`, a closed terminal, a full disk.

    What cannot be written then is lost, and nothing else happens.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream  # None where it was closed before this process began

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return bool(self._stream.isatty())
        return False

    def fileno(self) -> int:
        """Raises what the stream itself raises where it does not have one."""
        return int(self._stream.fileno())


class _Streams:
    """Where lines go: the present standard streams, or those that a run keeps for the person who started it."""

    def __init__(self) -> None:
        self.apart: tuple[Lasting, Lasting] | None = None
        self.copy: Callable[[str], None] = lambda text: None
        """Gets every line as well."""
        self.log: Path | None = None
        """Where everything else that is printed goes."""

    @property
    def out(self) -> Lasting:
        return self.apart[0] if self.apart else Lasting(sys.stdout)

    @property
    def err(self) -> Lasting:
        return self.apart[1] if self.apart else Lasting(sys.stderr)


STREAMS = _Streams()


def say(text: str = "") -> None:
    """Lines for the person who started this, from rank 0."""
    if is_first():
        _show(text, STREAMS.out)


def note(text: str) -> None:
    """Say what is good to know."""
    _apart(f"note: {text}")


def warn(text: str) -> None:
    """Say what was probably not meant."""
    _apart(f"warning: {text}")


def _apart(text: str) -> None:
    if is_first():
        _show_wrapped(text, STREAMS.out if STREAMS.apart else STREAMS.err)


def _show_wrapped(text: str, stream: Lasting) -> None:
    """Wrapped on a terminal; in files a line stays whole, so that it can be searched for."""
    _show("\n".join(map(_wrapped, text.split("\n"))) if stream.isatty() else text, stream)


def _wrapped(line: str) -> str:
    return textwrap.fill(line, width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def complain(text: str) -> None:
    """An error, from whichever rank meets it."""
    _show_wrapped(text, STREAMS.err)


def bars() -> type:
    """tqdm's class, with bars of rank 0 alone, and on terminals: files and pipes get no carriage returns."""
    from tqdm import tqdm  # some commands draw no bar and start faster without

    class Bar(tqdm):
        def __init__(self, *arguments: Any, disable: bool | None = False, **options: Any) -> None:
            stream = STREAMS.out if STREAMS.apart else STREAMS.err
            hidden = bool(disable) or not (is_first() and stream.isatty())
            super().__init__(*arguments, **{**options, "file": stream, "disable": hidden, "dynamic_ncols": True})

    return Bar


def progress(total: float | None, description: str, unit: str, *, shown: bool = True, **options: Any) -> Any:
    """One of `bars`."""
    return bars()(total=total, desc=description, unit=unit, disable=not shown, **options)


def visible(text: str) -> str:
    """A text of data or of a model, its control characters, which a terminal would obey, as signs for them."""
    return text.translate(_VISIBLE)


def width() -> int:
    """Columns to use."""
    with suppress(OSError, ValueError, AttributeError):  # no terminal, or one that does not say
        return os.get_terminal_size(STREAMS.out.fileno()).columns or PLAIN_WIDTH
    return PLAIN_WIDTH


def is_first() -> bool:
    """Whether this process is rank 0, or not one of several."""
    return rank_among_several(os.environ) in (None, 0)


def _show(text: str, stream: Lasting) -> None:
    with _bars_away():
        stream.write(f"{text}\n")
    STREAMS.copy(text)


@contextmanager
def _bars_away() -> Iterator[None]:
    """Clears progress bars while a line is printed, so that it appears above them, whichever stream each uses."""
    if "tqdm" not in sys.modules:
        yield
        return
    from tqdm import tqdm

    with tqdm.get_lock():
        drawn = [bar for bar in tqdm._instances if not bar.disable]
        for bar in drawn:
            bar.clear(nolock=True)
        yield
        for bar in drawn:
            bar.refresh(nolock=True)
