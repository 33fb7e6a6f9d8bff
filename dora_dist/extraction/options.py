"""What can be chosen of an extraction, and what an extractor of one kind of files answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from dora_dist.data.features import FRAMES, GRID
from dora_dist.extraction.items import Item
from dora_dist.extraction.store import Arrays
from dora_dist.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions:
    """How features are made. What changes them is kept with them, and must be the same when an extraction goes on."""

    layer: int = -2
    """Of the tower, for pictures; LLaVA's. 0 are the embeddings, -1 is the last layer."""
    grid: tuple[int, int] = (GRID, GRID)
    """Rows and columns of a picture's regions; VL-BART's."""
    boxes: Literal["none", "grid"] = "none"
    """Whether the regions' boxes are kept. Without, VL-BART's are zero."""
    frames_per_second: float = 1.0
    """Of a video, that are looked at."""
    most_frames: int = FRAMES
    """Rows of a video's features; those of longer videos are pooled. VL-BART's."""
    image_size: int | None = None
    """Side length of what the tower sees, in pixels (None: the tower's)."""
    image_aspect_ratio: Literal["pad", "crop"] = "pad"
    """pad: the whole picture, with borders of the mean colour; crop: its middle square."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format in the tower."""
    store: Literal["fp32", "fp16"] = "fp32"
    """Number format in the files."""
    image_folder: Path | None = None
    """Where the files of a list of records are (None: in the list's folder)."""
    max_image_pixels: int = 50_000_000
    """Largest picture or frame that is decoded, width times height after padding."""
    bad_images: Literal["error", "skip"] = "error"
    """What a file that is missing or cannot be read does: ends the extraction, or is left out and counted."""
    part: tuple[int, int] = (1, 1)
    """(i, n): every n-th item from the i-th on, so that n processes can share the work."""
    batch_size: int = 32
    """Pictures or frames in the tower at a time."""
    num_workers: int = 0
    """Processes that read pictures, or videos; 0: this one."""


def option(name: str) -> str:
    """What the command calls one of these."""
    return "--" + name.replace("_", "-")


Outcome = tuple[Item, Arrays | UserError]
"""An item with its features in fp32, or why there are none."""


class Extractor(Protocol):
    """Makes features of one kind of files."""

    def settings(self) -> dict[str, Any]:
        """What changes the features, beyond the weights of the tower, as JSON."""

    def check(self) -> None:
        """Raise UserError where no file at all could be made features of: of a layer or a size that is not there."""

    def outcomes(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """What comes out of each item, in any order."""
