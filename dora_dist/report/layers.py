"""What the page shows of each layer: ranks, and how far magnitude and direction have moved, as maps of the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dora_dist.analysis.decomposition import Moved, Recording
from dora_dist.analysis.grid import Grid, grid
from dora_dist.report.charts import Chart, Curve
from dora_dist.report.reading import Run

MOST_STEPS = 30
"""Of one map, evenly spaced, the last among them."""
SHADES = 10
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class LayerMap:
    """One number for each adapted module at some steps; a cell without one is None."""

    name: str
    title: str
    about: str
    grid: Grid
    steps: Sequence[int]
    cells: Sequence[Sequence[Sequence[float | None]]]
    """(steps, layers, kinds)."""

    from_zero: bool = False
    """Whether shades begin at 0, and not at the smallest number."""

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The numbers of the lightest and the darkest shade."""
        numbers = [c for step in self.cells for row in step for c in row if c is not None]
        return (0.0 if self.from_zero else min(numbers)), max(numbers)

    def shade(self, value: float | None) -> int | None:
        """From 0 to SHADES."""
        low, high = self.ends
        if value is None:
            return None
        return round(SHADES * (value - low) / (high - low)) if high > low else 0

    @cached_property
    def power(self) -> int:
        """Cells are written as multiples of 10 to this power, so that they are short."""
        largest = max(map(abs, self.ends))
        power = math.floor(math.log10(largest)) if largest > 0 else 0
        return 0 if -1 <= power <= 3 else power

    def written(self, value: float | None) -> str:
        if value is None:
            return ""
        return str(value) if isinstance(value, int) else f"{value / 10**self.power:.2f}"

    def as_json(self) -> dict[str, Any]:
        """Of every step the texts and the shades, (steps, layers, kinds)."""
        written = [[[self.written(c) for c in row] for row in step] for step in self.cells]
        shades = [[[self.shade(c) for c in row] for row in step] for step in self.cells]
        return {"name": self.name, "steps": list(self.steps), "written": written, "shades": shades}


def of_run(run: Run) -> list[LayerMap]:
    """The maps of what a run has recorded."""
    return [found for found in (ranks(run), *moved(run.recordings)) if found is not None]


def ranks(run: Run) -> LayerMap | None:
    """The components of each layer that are open after each pruning; None without dynamic rank."""
    events = {int(r["step"]): r["components_by_layer"] for r in run.records if _says_ranks(r)}
    return _map("ranks", "Rank of each layer", "components that are open", tables=events, from_zero=True)


def moved(recordings: Sequence[Recording]) -> list[LayerMap | None]:
    """ΔM and ΔD of each recorded matrix, and the magnitudes where they are recorded."""

    def tables(value: str) -> dict[int, dict[str, float | None]]:
        return {r.step: {name: getattr(m, value) for name, m in r.matrices.items()} for r in recordings}

    direction = f"mean of 1 {_MINUS} cos(v, w) over rows v of the weight and w of the base's"
    magnitude = f"mean of |m {_MINUS} ‖w‖| over magnitudes m and rows w of the base's weight"
    return [
        _map("delta-d", "Change of direction, ΔD", direction, tables=tables("delta_d")),
        _map("delta-m", "Change of magnitude, ΔM", magnitude, tables=tables("delta_m")),
        _map("magnitude", "Magnitude, m", "mean over the rows of the layer", tables=tables("magnitude")),
    ]


def curves(run: Run) -> list[Chart]:
    """ΔD and ΔM over the steps, the mean of each kind of module."""
    every = grid(dict.fromkeys(name for r in run.recordings for name in r.matrices))
    found = []
    for value, title, about in (
        ("delta_d", "Change of direction, ΔD", "mean over the layers of each kind"),
        ("delta_m", "Change of magnitude, ΔM", "mean over the layers of each kind"),
    ):
        own = [_of_kind(run.recordings, every, kind, value) for kind in range(len(every.kinds))]
        drawn = [curve for curve in own if curve.xs]
        if drawn:
            found.append(Chart(f"mean-{value.replace('_', '-')}", title, "number", drawn, about=about))
    return found


def _of_kind(recordings: Sequence[Recording], every: Grid, kind: int, value: str) -> Curve:
    xs: list[float] = []
    ys: list[float | None] = []
    for recording in recordings:
        own = [_number(m, value) for name, m in recording.matrices.items() if every.places[name][1] == kind]
        numbers = [number for number in own if number is not None]
        if numbers:
            xs.append(recording.step)
            ys.append(sum(numbers) / len(numbers))
    return Curve(every.kinds[kind], kind, xs, ys, "points")


def _number(matrix: Moved, value: str) -> float | None:
    found = getattr(matrix, value)
    return None if found is None else float(found)


def _map(
    name: str,
    title: str,
    about: str,
    *,
    tables: Mapping[int, Mapping[str, float | None]],
    from_zero: bool = False,
) -> LayerMap | None:
    if not any(value is not None for table in tables.values() for value in table.values()):
        return None
    steps = sorted(tables)
    if len(steps) > MOST_STEPS:
        steps = [steps[round(place * (len(steps) - 1) / (MOST_STEPS - 1))] for place in range(MOST_STEPS)]
    every = grid(dict.fromkeys(module for table in tables.values() for module in table))
    cells = [_cells(every, tables[step]) for step in steps]
    return LayerMap(name, title, about, every, steps, cells, from_zero=from_zero)


def _cells(every: Grid, table: Mapping[str, float | None]) -> list[list[float | None]]:
    rows: list[list[float | None]] = [[None] * len(every.kinds) for _ in every.layers]
    for module, value in table.items():
        row, column = every.places[module]
        rows[row][column] = value
    return rows


def _says_ranks(record: Mapping[str, Any]) -> bool:
    table = record.get("components_by_layer")
    return isinstance(table, Mapping) and all(isinstance(r, int) for r in table.values()) and "step" in record
