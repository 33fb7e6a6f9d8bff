"""What the commands' declarations share: how one is declared, and the kinds of values of options."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPES = ("bf16", "fp16", "fp32")
Commands = Any  # argparse's own type for this is private


def declare(
    commands: Commands,
    name: str,
    handler: Callable[[argparse.Namespace], None],
    *,
    summary: str,
    example: str,
    usage: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command that `handler` answers; `example` is the end of its help, `usage` what follows its name there."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        usage=usage and f"dora-dist {name} {usage}",
        description=f"{summary[0].upper()}{summary[1:]}.\n\nexample:  {example}",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    command.set_defaults(handler=handler)
    return command


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=44)


def add_output(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help=f"new folder for {what}")
    command.add_argument("--overwrite", action="store_true", help="replace the output folder if it is there already")


def add_plugins(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--plugins",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Python modules to import first, as plugins in a config file; those that a run folder names are not "
        "imported by themselves",
    )


def positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def titled_run(text: str) -> tuple[str | None, Path]:
    """A run's folder, perhaps with a title: TITLE=RUN."""
    title, equals, run = text.partition("=")
    if not equals or os.path.isdir(text):
        return None, Path(text)
    if not title or not run:
        raise argparse.ArgumentTypeError(f"{text!r} is not TITLE=RUN, such as DoRA=runs/dora")
    return title, Path(run)
