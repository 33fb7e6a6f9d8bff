"""The lines that a run prints while it trains: a table with a row for each logging step, and events between them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HEADER_EVERY = 30
"""Rows after which the titles are repeated."""


@dataclass(frozen=True)
class Column:
    """One quantity of the table; columns are left out where their key is not logged or the screen is too narrow."""

    key: str
    title: str
    width: int
    form: Callable[[Any], str]
    keep: int
    """Order in which columns are kept on a narrow screen: 0 first."""


def duration(seconds: float) -> str:
    """Such as 0:41, 1:02:07 or 3d 04h."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02}h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


COLUMNS = (
    Column("epoch", "epoch", 5, "{:.2f}".format, 4),
    Column("loss", "loss", 8, "{:.4f}".format, 0),
    Column("grad_norm", "grad norm", 9, "{:#.3g}".format, 5),
    Column("learning_rate", "lr", 8, "{:.2e}".format, 2),
    Column("tokens_per_second", "tokens/s", 9, "{:,.0f}".format, 3),
    Column("mfu", "MFU", 5, "{:.1%}".format, 7),
    Column("filled", "filled", 6, "{:.1%}".format, 8),
    Column("peak_memory_gb", "memory", 8, "{:.2f} GB".format, 6),
    Column("elapsed", "time", 8, duration, 4),
    Column("left", "left", 8, duration, 1),
)
GAP = "  "


class Table:
    """Rows under titles, as wide as the screen allows."""

    def __init__(self, max_steps: int, width: int) -> None:
        self._steps = f"{max_steps:,}"
        self._width, self._rows = width, 0
        self._shown: tuple[Column, ...] = ()

    def row(self, record: dict[str, Any]) -> list[str]:
        """The lines to print for a record of metrics.jsonl that has a loss, titles among them where they are due."""
        columns = self._chosen(record)
        lines = []
        if columns != self._shown or self._rows % HEADER_EVERY == 0:
            titles = GAP.join(column.title.rjust(column.width) for column in columns)
            lines = ["", "step".rjust(self._step_width) + GAP + titles]
            self._shown, self._rows = columns, 0
        self._rows += 1
        values = GAP.join(column.form(record[column.key]).rjust(column.width) for column in columns)
        return [*lines, self.at(record["step"]) + GAP + values]

    def event(self, step: int, text: str) -> str:
        """A line about something that happened at a step."""
        return f"{self.at(step)}{GAP}{text}"

    def at(self, step: int) -> str:
        """The first column."""
        return f"{step:,}/{self._steps}".rjust(self._step_width)

    @property
    def _step_width(self) -> int:
        return max(2 * len(self._steps) + 1, len("step"))

    def _chosen(self, record: dict[str, Any]) -> tuple[Column, ...]:
        left = self._width - self._step_width
        kept = set()
        for column in sorted(COLUMNS, key=lambda column: column.keep):
            if record.get(column.key) is not None and column.width + len(GAP) <= left:
                left -= column.width + len(GAP)
                kept.add(column.key)
        return tuple(column for column in COLUMNS if column.key in kept)
