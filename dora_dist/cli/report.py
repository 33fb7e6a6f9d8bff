"""`dora-dist report`: the page of a run, or one that compares several."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from dora_dist.checkpoint.run_folder import REPORT
from dora_dist.cli.options import Commands, declare, titled_run
from dora_dist.runtime.console import say
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import disk_errors, new_file

COMPARISON = Path("comparison.html")


def declare_report(commands: Commands) -> None:
    command = declare(
        commands,
        "report",
        _report,
        summary="write the page of a run (curves, ranks and movement of each layer, answers, settings), or one that "
        "compares runs",
        example="dora-dist report runs/quickstart/train\n"
        "          dora-dist report LoRA=runs/lora DoRA=runs/dora --output comparison.html",
    )
    command.add_argument(
        "runs",
        nargs="+",
        type=titled_run,
        metavar="[TITLE=]RUN",
        help="run folder, running or ended; of several the page has their curves over one another, what they came to, "
        "and the settings in which they differ",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"page to write, .html (default: {REPORT} in the run's folder; of several runs {COMPARISON})",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the --output file if it is there already")


def _report(options: argparse.Namespace) -> None:
    from dora_dist.report import page, reading

    output = _output([run for _, run in options.runs], options.output, overwrite=options.overwrite)
    runs = [reading.read(folder, title) for title, folder in options.runs]
    runs = reading.told_apart(runs)
    text = page.of_run(runs[0], now=time.time()) if len(runs) == 1 else page.of_runs(runs, now=time.time())
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with new_file(output) as partial:
            partial.write_text(text, encoding="utf-8")
    say(f"written: {output}; open it in a browser")


def _output(folders: Sequence[Path], asked: Path | None, *, overwrite: bool) -> Path:
    """Where the page goes. A run's own page is replaced, as the run itself does. Raises UserError."""
    if asked is None and len(folders) == 1:
        return folders[0] / REPORT
    output = asked or COMPARISON
    if output.suffix != ".html":
        raise UserError(f"--output {output}: give a name that ends in .html")
    if os.path.isdir(output):
        raise UserError(f"--output {output}: is a folder; give the name of a file in it")
    if os.path.lexists(output) and not overwrite:
        raise UserError(f"--output {output}: already exists; choose another name, or replace it with --overwrite")
    return output
