"""`dora-dist extract-features`."""

import argparse
import re
from pathlib import Path

from dora_dist.cli.endings import ended_by_signals
from dora_dist.cli.options import DTYPES, Commands, declare, positive
from dora_dist.runtime.console import say, warn

_MOST_NAMED = 5


def declare_extract_features(commands: Commands) -> None:
    command = declare(
        commands,
        "extract-features",
        _extract_features,
        summary="compute features of pictures or videos with a frozen vision tower, as VL-BART is trained on them",
        example="dora-dist extract-features train2014/ --tower openai/clip-vit-base-patch32 --output train2014.h5\n"
        "          dora-dist extract-features clips/ --tower openai/clip-vit-base-patch32 --output clips/features/",
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help='folder of pictures or of videos, one such file, or a list of records (.json, .jsonl) with "image" or '
        '"video", a path, and perhaps "id"; without, features are named by the file\'s stem',
    )
    command.add_argument(
        "--tower", required=True, metavar="MODEL", help="vision tower (CLIP, SigLIP, DINOv2, ...): folder or hub name"
    )
    command.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PLACE",
        help="HDF5 file (.h5) for pictures, with ID/features; folder for videos, with ID.npz; what is in it already "
        "is skipped, so the same command resumes after an interruption",
    )
    _add_pictures(command)
    _add_videos(command)
    _add_work(command)


def _add_pictures(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layer", type=int, default=-2, metavar="N", help="layer of the tower, for pictures (%(default)s)"
    )
    command.add_argument(
        "--grid",
        type=_grid,
        default=(6, 6),
        metavar="ROWSxCOLUMNS",
        help="regions of a picture, each the maximum over its patches (6x6)",
    )
    command.add_argument(
        "--boxes",
        choices=("none", "grid"),
        default="none",
        help="grid: keep each region's box, as parts of the square that the tower sees; none: boxes are zero, as "
        "VL-BART's (%(default)s)",
    )
    command.add_argument(
        "--image-size", type=positive, metavar="PIXELS", help="side length of what the tower sees (the tower's)"
    )
    command.add_argument(
        "--image-aspect-ratio",
        choices=("pad", "crop"),
        default="pad",
        help="pad: the whole picture, with borders of the mean colour; crop: its middle square (%(default)s)",
    )
    command.add_argument(
        "--image-folder", type=Path, metavar="FOLDER", help="where the files of a list are (the list's folder)"
    )
    command.add_argument(
        "--max-image-pixels",
        type=positive,
        default=50_000_000,
        metavar="N",
        help="largest picture or frame that is decoded, width times height after padding (%(default)s)",
    )
    command.add_argument(
        "--bad-images",
        choices=("error", "skip"),
        default="error",
        help="a file that is missing or cannot be read: ends the command, or is left out and counted (%(default)s)",
    )


def _add_videos(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--frames-per-second",
        type=_above_zero,
        default=1.0,
        metavar="X",
        help="frames of a video that are looked at; each becomes one vector, the tower's pooled output (1)",
    )
    command.add_argument(
        "--most-frames",
        type=positive,
        default=64,
        metavar="N",
        help="vectors of a video; those of longer videos are pooled to their maximum (%(default)s)",
    )


def _add_work(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="pictures or frames at a time (%(default)s)"
    )
    command.add_argument(
        "--num-workers",
        type=lambda text: 0 if text == "0" else positive(text),
        default=0,
        metavar="N",
        help="processes that read pictures or decode videos; 0: this one (%(default)s)",
    )
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="number format in the tower (%(default)s)")
    command.add_argument(
        "--store", choices=("fp32", "fp16"), default="fp32", help="number format in the output (%(default)s)"
    )
    command.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="every N-th file from the I-th on: start N such commands, one a GPU; the last to end makes the HDF5 file",
    )


def _extract_features(options: argparse.Namespace) -> None:
    from dora_dist.extraction.options import ExtractionOptions
    from dora_dist.extraction.run import extract_features

    chosen = {name: value for name, value in vars(options).items() if name in ExtractionOptions.__dataclass_fields__}
    with ended_by_signals(left="what was extracted is kept; the same command goes on from there"):
        done = extract_features(options.source, options.tower, options.output, ExtractionOptions(**chosen))
    if done.skipped:
        shown = "".join(f"\n  {why}" for _, why in done.skipped[:_MOST_NAMED])
        more = len(done.skipped) - _MOST_NAMED
        warn(f"{len(done.skipped):,} left out:{shown}" + (f"\n  and {more:,} more" if more > 0 else ""))
    state = "complete" if done.complete else "not complete: other parts are to come"
    say(f"{options.output}: {done.new:,} new and {done.present:,} older of {done.total:,}; {state}")


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxCOLUMNS, such as 6x6")
    return int(match[1]), int(match[2])


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 2/8")
    return int(match[1]), int(match[2])


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
