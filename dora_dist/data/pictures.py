"""Picture files to pixels, as the model's own processor makes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_dist.runtime.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Kinds of files that are decoded: of pixels alone. EPS, for one, would run another program."""
MOST_ELONGATED = 100
"""Largest ratio of the sides of a picture that is not padded: resizing by the shorter side makes thin strips huge."""


def _field(name: str) -> str:
    return f"data.{name}"


class PictureReader:
    """Reads one picture below a folder into what the model takes; usable in loader processes."""

    def __init__(
        self, folder: Path, processor: Any, *, pad: bool, max_pixels: int, named: Callable[[str], str] = _field
    ):
        """processor: an image processor of transformers. pad: fill to a square with its mean colour first, as
        LLaVA-1.5 is trained. max_pixels: width x height, of the square where there will be one, beyond which a file
        is refused before it is decoded. named: what the user calls max_image_pixels and image_aspect_ratio."""
        self.folder, self.processor, self.pad, self.max_pixels, self.named = folder, processor, pad, max_pixels, named
        settings = processor.to_dict()  # not all kinds of processors have all of them
        mean = settings.get("image_mean") or [0.5] * 3
        self.background = tuple(int(channel * 255) for channel in mean)
        self.squares = pad or bool(settings.get("do_pad"))

    def __call__(self, path: str) -> Tensor:
        """(3, height, width) fp32. Raises UserError for a file that is missing, too large or not a whole picture."""
        from PIL import Image, UnidentifiedImageError

        file = self.folder / path
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is ours, below
                with Image.open(file, formats=FORMATS) as image:
                    self.check_size(file, *image.size)
                    return self.pixels(image.convert("RGB"))
        except UserError:
            raise
        except Image.DecompressionBombError as error:  # more than our bound can be
            raise UserError(
                f"picture {file} has more pixels than {self.named('max_image_pixels')} = {self.max_pixels:,}, and than "
                "are ever decoded; make it smaller"
            ) from error
        except FileNotFoundError as error:
            raise UserError(f"picture {file} does not exist") from error
        except UnidentifiedImageError as error:
            raise UserError(f"picture {file} cannot be read: it is damaged, or none of {', '.join(FORMATS)}") from error
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise UserError(f"picture {file} cannot be read: {error}") from error

    def check_size(self, file: Path, width: int, height: int) -> None:
        """Raise UserError for a picture that takes too much memory on its way to the model, not only in itself."""
        short, long = sorted((width, height))
        made = long * long if self.squares else width * height
        if made > self.max_pixels:
            padded = f", padded to {long} x {long}" if made > width * height else ""
            raise UserError(
                f"picture {file} has {width} x {height} pixels{padded}, more than {self.named('max_image_pixels')} = "
                f"{self.max_pixels:,}; make it smaller, or raise the bound if you trust it"
            )
        if not self.squares and long > MOST_ELONGATED * short:
            raise UserError(
                f"picture {file} has {width} x {height} pixels: one side is more than {MOST_ELONGATED} times the "
                f'other; crop it, or set {self.named("image_aspect_ratio")} to "pad"'
            )

    def pixels(self, image: Any) -> Tensor:
        """(3, height, width) fp32 of an RGB picture of Pillow."""
        from PIL import Image

        if self.pad and image.width != image.height:
            side = max(image.size)
            square = Image.new("RGB", (side, side), self.background)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def size(self) -> tuple[int, int]:
        """(height, width) of what the model takes. Raises UserError if it depends on the picture's shape."""
        from PIL import Image

        shapes = {tuple(self.pixels(Image.new("RGB", size)).shape[1:]) for size in ((64, 64), (64, 192), (192, 64))}
        if len(shapes) > 1:
            raise UserError(
                "model.path: its image processor makes pictures of several sizes, which one batch cannot hold; set "
                'data.image_aspect_ratio to "pad"'
            )
        [(height, width)] = shapes
        return height, width


@dataclass(frozen=True)
class PictureTokens:
    """What a text has for each picture: `count` tokens of id `token_id`, written `token`."""

    token: str
    token_id: int
    count: int

    def widened(self, ids: Iterable[int]) -> list[int]:
        """Token ids in which the single token of each picture is repeated `count` times."""
        return [token for token in ids for _ in range(self.count if token == self.token_id else 1)]


@dataclass(frozen=True)
class PictureProcessor:
    """What makes a LLaVA's input: `size` is (height, width) of every picture as the model takes it."""

    tokenizer: Any
    reader: PictureReader
    size: tuple[int, int]
    stands: PictureTokens


def missing_pictures(folder: Path, paths: Iterable[str]) -> set[str]:
    """Those of `paths` that are not below `folder`; each folder is listed once, however many pictures it holds."""
    by_parent: dict[Path, list[str]] = {}
    for path in paths:
        by_parent.setdefault((folder / path).parent, []).append(path)
    missing = set()
    for parent, named in by_parent.items():
        names = {entry.name for entry in parent.iterdir()} if parent.is_dir() else set()
        missing |= {path for path in named if Path(path).name not in names}
    return missing
