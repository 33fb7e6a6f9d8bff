"""What a figure of the weight-decomposition analysis shows: points, panels and correlations, also as plain numbers."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dora_dist.adapters.patterns import matches
from dora_dist.analysis.decomposition import Recording
from dora_dist.runtime.errors import UserError

QUERY_AND_VALUE = {
    "query": r"(?:.*\.)?(?:q_proj|query|q_lin|q)",
    "value": r"(?:.*\.)?(?:v_proj|value|v_lin|v)",
}
"""The kinds of matrices that the paper shows, by the names that families of models have for them."""
ALL = "all"


@dataclass(frozen=True)
class Point:
    """A matrix at a recording, which is number `place` (from 0) of the `places` of its run that are shown."""

    run: str
    kind: str
    matrix: str
    step: int
    place: int
    places: int
    delta_d: float
    delta_m: float

    @property
    def share(self) -> float:
        """Of the run's recordings that are shown, up to this one."""
        return (self.place + 1) / self.places


@dataclass(frozen=True)
class Panel:
    """What one panel shows; `correlations` are Pearson's of ΔD and ΔM by kind, None where they are undefined."""

    title: str
    points: Sequence[Point]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(point.kind for point in self.points))

    @property
    def correlations(self) -> dict[str, float | None]:
        every = self.kinds
        found = {kind: correlation([p for p in self.points if p.kind == kind]) for kind in every}
        return found | ({ALL: correlation(self.points)} if len(every) > 1 else {})


def correlation(points: Sequence[Point]) -> float | None:
    """Pearson's correlation of ΔD and ΔM; None for fewer than two points, or where one of both does not vary."""
    if len(points) < 2:
        return None
    d, m = np.array([[p.delta_d, p.delta_m] for p in points]).T
    if d.std() == 0 or m.std() == 0:
        return None
    return float(np.corrcoef(d, m)[0, 1])


def evenly(recordings: Sequence[Recording], count: int) -> list[Recording]:
    """At most `count` of a run's recordings, evenly spaced, the last among them."""
    total = len(recordings)
    if total <= count:
        return list(recordings)
    return [recordings[math.ceil((place + 1) * total / count) - 1] for place in range(count)]


def at_steps(recordings: Sequence[Recording], steps: Sequence[int], file: Path) -> list[Recording]:
    """The recordings of these steps. Raises UserError if the run of `file` has none at one of them."""
    by_step = {recording.step: recording for recording in recordings}
    if absent := [step for step in steps if step not in by_step]:
        there = ", ".join(map(str, by_step))
        raise UserError(f"--steps: {file} has no recording of step {absent[0]}; it has: {there}")
    return [by_step[step] for step in sorted(set(steps))]


def points(
    run: str, recordings: Sequence[Recording], file: Path, *, kinds: Mapping[str, str], every: bool
) -> list[Point]:
    """The points of a run. `kinds` are patterns of matrices by title; of several that match one, the first counts.

    Raises UserError where no kind is there, or, with `every`, where one is not.
    """
    names = list(dict.fromkeys(name for recording in recordings for name in recording.matrices))
    of_name: dict[str, str] = {}
    for kind, pattern in kinds.items():
        own = [name for name in names if matches(pattern, name, "--modules")]
        if not own and every:
            raise UserError(f"--modules: {pattern!r} matches no matrix in {file}; it has: {_endings(names)}")
        of_name = dict.fromkeys(own, kind) | of_name
    if not of_name:
        raise UserError(f"--modules: {file} has no query or value matrix; name others, it has: {_endings(names)}")
    found = [
        Point(run, of_name[name], name, recording.step, place, len(recordings), moved.delta_d, moved.delta_m)
        for place, recording in enumerate(recordings)
        for name, moved in recording.matrices.items()
        if name in of_name and moved.delta_d is not None and moved.delta_m is not None
    ]
    if not found:
        raise UserError(f"{file}: the matrices that --modules names have no rows other than zeros")
    return found


def _endings(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def as_csv(panels: Sequence[Panel]) -> str:
    """A line for each point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["panel", "run", "kind", "matrix", "step", "delta_d", "delta_m"])
    for panel in panels:
        for p in panel.points:
            writer.writerow([panel.title, p.run, p.kind, p.matrix, p.step, repr(p.delta_d), repr(p.delta_m)])
    return text.getvalue()


def as_json(panels: Sequence[Panel]) -> dict[str, Any]:
    """Correlations of each panel, and of each run in it where there are several."""
    return {"panels": [_described(panel) for panel in panels]}


def _described(panel: Panel) -> dict[str, Any]:
    runs = list(dict.fromkeys(p.run for p in panel.points))
    steps = sorted({p.step for p in panel.points})
    described = {"title": panel.title, "runs": runs, "steps": steps, "points": len(panel.points)}
    each = {run: Panel(run, [p for p in panel.points if p.run == run]).correlations for run in runs}
    return described | {"correlations": panel.correlations} | ({"by_run": each} if len(runs) > 1 else {})


def as_table(panels: Sequence[Panel]) -> str:
    """A line per panel: how many points, and the correlation of each kind."""
    kinds = list(dict.fromkeys(kind for panel in panels for kind in panel.correlations))
    rows = [["correlation", "points", *kinds]]
    for panel in panels:
        found = panel.correlations
        cells = ("" if (value := found.get(kind)) is None else f"{value:+.2f}" for kind in kinds)
        rows.append([panel.title, str(len(panel.points)), *cells])
    wide, narrow = max(len(row[0]) for row in rows), [max(len(kind), 6) for kind in kinds]
    return "\n".join(
        "  ".join([f"{row[0]:<{wide}}", f"{row[1]:>6}", *(f"{c:>{n}}" for c, n in zip(row[2:], narrow, strict=True))])
        for row in rows
    )
