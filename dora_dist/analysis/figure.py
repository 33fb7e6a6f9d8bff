"""The figure of a weight-decomposition analysis (Liu et al., Figure 2).

A panel per run or per group of runs that share a title; in it a point for each matrix and recording: ΔD across, ΔM up,
in the recording's colour, with the marker and the regression line of its kind (query, value).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dora_dist.analysis.points import Panel, Point

_MARKERS, _LINES, _GREY = "osD^vPX*", ("-", "--", "-.", ":"), "0.35"


def draw(panels: Sequence[Panel], path: Path, form: str) -> None:
    """Write the figure; `form` is one of matplotlib's formats, such as "png"."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    kinds = list(dict.fromkeys(kind for panel in panels for kind in panel.kinds))
    every = [point for panel in panels for point in panel.points]
    when = what_colours_say(every)
    times = sorted({when(point) for point in every})
    colours = dict(zip(times, pyplot.get_cmap("viridis")(np.linspace(0.08, 0.88, len(times))), strict=True))
    columns = min(len(panels), 4)
    shape = -(-len(panels) // columns), columns
    size = (3.7 * columns, 3.4 * shape[0] + 0.7)
    figure, axes = pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, panel, kinds, [colours[when(point)] for point in panel.points])
    shown = [
        Line2D([], [], marker=marker, linestyle=line, label=kind, markersize=5, color=_GREY, linewidth=1.2)
        for kind, (marker, line) in zip(kinds, _styles(kinds), strict=True)
    ]
    shown += [Line2D([], [], marker="o", linestyle="", color=c, label=name) for (_, name), c in colours.items()]
    figure.legend(handles=shown, loc="outside lower center", ncols=min(len(shown), 2 * columns + 1), frameon=False)
    figure.savefig(path, dpi=200, format=form)
    pyplot.close(figure)


def _styles(kinds: Sequence[str]) -> list[tuple[str, Any]]:
    """A marker and a kind of line for each."""
    return [(_MARKERS[i % len(_MARKERS)], _LINES[i % len(_LINES)]) for i in range(len(kinds))]


def what_colours_say(points: Sequence[Point]) -> Callable[[Point], tuple[float, str]]:
    """Of a point, what to sort by and what to read: its step, where runs share steps, else how far its run had come."""
    if len({point.step for point in points}) <= max(point.places for point in points):
        return lambda point: (point.step, f"step {point.step:,}")
    return lambda point: (point.share, f"{point.share:.0%} of a run's recordings")


def _draw_panel(axis: Any, panel: Panel, kinds: Sequence[str], colours: Sequence[Any]) -> None:
    """`colours` are the points'."""
    found = panel.correlations
    told, styles = [], dict(zip(kinds, _styles(kinds), strict=True))
    for kind in panel.kinds:
        marker, line = styles[kind]
        own = [p for p in panel.points if p.kind == kind]
        d, m = np.array([[p.delta_d, p.delta_m] for p in own]).T
        shade = [colour for p, colour in zip(panel.points, colours, strict=True) if p.kind == kind]
        axis.scatter(d, m, c=shade, marker=marker, s=18, alpha=0.85, linewidths=0)
        if (r := found[kind]) is not None:
            slope, start = np.polyfit(d, m, 1)
            ends = np.array([d.min(), d.max()])
            axis.plot(ends, start + slope * ends, linestyle=line, color=_GREY, linewidth=1.4)
            told.append(f"{kind} r = {r:+.2f}")
    lines = [",  ".join(told[first : first + 2]) for first in range(0, len(told), 2)]
    axis.set_title(panel.title, loc="left", fontsize=12, pad=8 + 12 * max(len(lines), 1))
    axis.annotate("\n".join(lines), (1, 1), (0, 5), "axes fraction", "offset points", ha="right", fontsize=9)
    axis.set_xlabel("ΔD")
    axis.set_ylabel("ΔM")
    axis.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    for limit, largest in (
        (axis.set_xlim, max(p.delta_d for p in panel.points)),
        (axis.set_ylim, max(p.delta_m for p in panel.points)),
    ):
        if largest > 0:  # not before anything has moved
            limit(-0.04 * largest, 1.06 * largest)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
