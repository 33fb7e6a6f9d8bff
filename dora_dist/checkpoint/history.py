"""RUN_DIR/metrics.jsonl, the history of a run: one JSON object a line, whatever happened and when.

docs/reference/files.md has its events and their fields. Rank 0 alone writes it.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dora_dist.checkpoint.run_folder import METRICS
from dora_dist.runtime.errors import LostRank, Stopped
from dora_dist.runtime.folders import disk_errors

START, END = "start", "end"
FINISHED, STOPPED, LOST, FAILED = "finished", "stopped", "lost", "failed"
"""How a start of a run ends; one that is killed writes no end."""


def _nothing(event: str) -> None:
    pass


class History:
    """The history of one start of a run. Leaving its context writes the start's end, once it has begun."""

    def __init__(self, run_dir: Path, *, first: bool, heard: Callable[[str], None] = _nothing) -> None:
        """`first`: whether this is rank 0; the others write nothing. `heard` gets the event of each line written."""
        self._file, self._first, self._heard = run_dir / METRICS, first, heard
        self._began: float | None = None
        self.step = 0
        """Optimizer steps taken so far."""

    @property
    def began(self) -> bool:
        """Whether the start has been written, and not its end."""
        return self._began is not None

    def begin(self, step: int, **fields: Any) -> None:
        """The run starts, or goes on from a checkpoint of `step`. Raises UserError where nothing can be written."""
        self._began, self.step = time.time(), step
        self.add(START, **fields)

    def add(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append a line; returns it. Numbers that JSON cannot hold become null. Raises UserError."""
        line = {"event": event, "step": self.step, "time": round(time.time(), 3), **fields}
        if self._first:
            with disk_errors(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line), ensure_ascii=False) + "\n")
            self._heard(event)
        return line

    def end(self, how: str, text: str) -> None:
        """The start is over; the first reason counts. Raises nothing: there may be no disk any more."""
        began, self._began = self._began, None
        if began is not None:
            with suppress(OSError, ValueError):
                self.add(END, how=how, text=text, seconds=round(time.time() - began, 3))

    def lost(self, text: str) -> None:
        """Another rank is gone, and this one about to be ended."""
        self.end(LOST, text)

    def __enter__(self) -> "History":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end(FINISHED, "")
        elif isinstance(error, Stopped):
            self.end(STOPPED, str(error))
        else:
            self.end(LOST if isinstance(error, LostRank) else FAILED, str(error) or type(error).__name__)


def _finite(value: Any) -> Any:
    """A copy without what only Python's JSON has: NaN and infinities are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
