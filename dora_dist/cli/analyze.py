"""`dora-dist analyze`: the figure of the weight-decomposition analysis of runs."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dist.checkpoint.run_folder import ANALYSIS
from dora_dist.cli.options import Commands, declare, positive, titled_run
from dora_dist.runtime import extras
from dora_dist.runtime.console import say
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import disk_errors, new_file, write_json

if TYPE_CHECKING:
    from dora_dist.analysis.points import Panel

FORMATS = (".png", ".svg", ".pdf")


def declare_analyze(commands: Commands) -> None:
    command = declare(
        commands,
        "analyze",
        _analyze,
        summary="draw how far magnitudes and directions of the weights moved in runs with --analysis.every N",
        example="dora-dist analyze runs/full runs/lora runs/dora --output analysis.png\n"
        "          dora-dist analyze DoRA=runs/seed1 DoRA=runs/seed2 --modules q_proj down_proj",
    )
    command.add_argument(
        "runs",
        nargs="+",
        type=titled_run,
        metavar="[TITLE=]RUN",
        help="run folder; a panel each, titled as the run's method, or as given; runs given the same title share one",
    )
    command.add_argument(
        "--modules",
        nargs="+",
        metavar="PATTERN",
        help="kinds of matrices to show, each with a marker and a correlation of its own: endings of module names, or "
        "expressions for whole names (default: the query and the value matrices)",
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--recordings", type=positive, default=4, metavar="N", help="recordings of a run, evenly spaced (%(default)s)"
    )
    which.add_argument("--steps", nargs="+", type=positive, metavar="STEP", help="the recordings of these steps")
    command.add_argument(
        "--output",
        type=Path,
        default=Path("analysis.png"),
        metavar="FILE",
        help="figure to write, .png, .svg or .pdf; numbers go into .csv (points) and .json (correlations) of the same "
        "name (%(default)s)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace these files if one is there already")


def _analyze(options: argparse.Namespace) -> None:
    output: Path = options.output
    _check_output(output, options.overwrite)
    extras.need("matplotlib", purpose="analyze")
    if options.modules and len(set(options.modules)) < len(options.modules):
        raise UserError(f"--modules: a pattern is given twice in {' '.join(options.modules)}")
    from dora_dist.analysis import figure, points

    panels = _panels(options)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with new_file(output) as partial:
            figure.draw(panels, partial, output.suffix.removeprefix("."))
        output.with_suffix(".csv").write_text(points.as_csv(panels), encoding="utf-8")
        write_json(output.with_suffix(".json"), points.as_json(panels))
    say(points.as_table(panels))
    say(f"written: {output}, {output.with_suffix('.csv').name} and {output.with_suffix('.json').name}")


def _panels(options: argparse.Namespace) -> "list[Panel]":
    """What the options ask to see, in their order. Raises UserError."""
    from dora_dist.analysis.decomposition import read_recordings
    from dora_dist.analysis.points import QUERY_AND_VALUE, Panel, Point, at_steps, evenly, points

    chosen = {pattern: pattern for pattern in options.modules or ()}
    panels: dict[tuple[str, Path | None], list[Point]] = {}
    for title, run in options.runs:
        file = run / ANALYSIS
        recordings = read_recordings(file)
        if not recordings:
            raise UserError(f"{file}: holds no recording yet")
        shown = at_steps(recordings, options.steps, file) if options.steps else evenly(recordings, options.recordings)
        key = (title, None) if title else (recordings[-1].method, run.resolve())
        found = points(str(run), shown, file, kinds=chosen or QUERY_AND_VALUE, every=bool(chosen))
        panels.setdefault(key, []).extend(found)
    return [Panel(_title(key, list(panels)), found) for key, found in panels.items()]


def _title(panel: tuple[str, Path | None], every: Sequence[tuple[str, Path | None]]) -> str:
    """A title, with as much of the run's path as tells it from the others of that title."""
    title, run = panel
    others = [other for name, other in every if name == title and other != run]
    if run is None or not others:
        return title
    known = [other.parts for other in others if other is not None]
    count = next(n for n in range(1, len(run.parts) + 1) if all(parts[-n:] != run.parts[-n:] for parts in known))
    return f"{title} ({Path(*run.parts[-count:])})"


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix not in FORMATS:
        raise UserError(f"--output {output}: give a name that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if os.path.isdir(output):
        raise UserError(f"--output {output}: is a folder; give the name of a file in it")
    for file in (output, output.with_suffix(".csv"), output.with_suffix(".json")):
        if os.path.lexists(file) and not overwrite:
            raise UserError(
                f"--output {output}: {file} already exists; choose another name, or replace it with --overwrite"
            )
