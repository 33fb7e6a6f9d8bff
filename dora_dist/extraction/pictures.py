"""Features of pictures: a grid of regions each, of one layer of a tower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d
from torch.utils.data import DataLoader, Dataset

from dora_dist.data.pictures import PictureReader
from dora_dist.extraction.items import Item
from dora_dist.extraction.options import ExtractionOptions, Outcome, option
from dora_dist.models.vision_tower import VisionTower
from dora_dist.runtime.errors import UserError


@dataclass(frozen=True)
class PictureExtractor:
    """A picture becomes rows x columns regions, each the maximum over the patches in it."""

    tower: VisionTower
    reader: PictureReader
    options: ExtractionOptions

    def settings(self) -> dict[str, Any]:
        own = {"layer": self.options.layer, "grid": list(self.options.grid), "boxes": self.options.boxes}
        return {**self.tower.settings(), **own}

    def check(self) -> None:
        self.regions(torch.zeros(1, 3, self.tower.side, self.tower.side))

    def outcomes(self, items: Sequence[Item]) -> Iterator[Outcome]:
        device = self.tower.model.device
        loader: DataLoader[Any] = DataLoader(
            _Pictures(items, self.reader),
            batch_size=self.options.batch_size,
            num_workers=self.options.num_workers,
            collate_fn=_collated,
            pin_memory=device.type == "cuda",
        )
        boxes = {"boxes": boxes_of(*self.options.grid)} if self.options.boxes == "grid" else {}
        for numbers, pixels, unreadable in loader:
            for number, why in unreadable:
                yield items[number], UserError(why)
            if numbers:
                features = self.regions(pixels.to(device, non_blocking=True)).float().cpu().numpy()
                for number, values in zip(numbers, features, strict=True):
                    yield items[number], {"features": values, **boxes}

    def regions(self, pixels: Tensor) -> Tensor:
        """(b, rows * columns, d) of pixels (b, 3, side, side), row by row, in the tower's dtype."""
        patches = self.tower.patches(pixels, self.options.layer)
        (height, width), (rows, columns) = patches.shape[2:], self.options.grid
        if height < rows or width < columns:
            raise UserError(
                f"{option('grid')} {rows}x{columns}: layer {self.options.layer} of the tower has {height} x {width} "
                f"patches of a picture of {self.tower.side} x {self.tower.side} pixels; give a grid of at most "
                f"{height}x{width}, or a larger {option('image_size')}"
            )
        return adaptive_max_pool2d(patches, (rows, columns)).flatten(2).transpose(1, 2)


def boxes_of(rows: int, columns: int) -> NDArray[np.float32]:
    """(rows * columns, 4): x1, y1, x2, y2 of each region, row by row, as parts of the square that the tower sees."""
    top, left = (part.ravel() for part in np.mgrid[0:rows, 0:columns])
    corners = [left / columns, top / rows, (left + 1) / columns, (top + 1) / rows]
    return np.stack(corners, axis=1).astype(np.float32)


class _Pictures(Dataset[tuple[int, Tensor | str]]):
    """Pixels of each item by its number, or why there are none."""

    def __init__(self, items: Sequence[Item], reader: PictureReader) -> None:
        self._items, self._reader = items, reader

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        try:
            return number, self._reader(self._items[number].path)
        except UserError as error:
            return number, str(error)


def _collated(batch: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor, list[tuple[int, str]]]:
    """Numbers and pixels of what could be read, and the rest with the reason."""
    read = [(number, pixels) for number, pixels in batch if isinstance(pixels, Tensor)]
    unreadable = [(number, why) for number, why in batch if isinstance(why, str)]
    pixels = torch.stack([pixels for _, pixels in read]) if read else torch.empty(0)
    return [number for number, _ in read], pixels, unreadable
