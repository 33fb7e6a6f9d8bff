"""Features of videos: one vector for each frame that is looked at."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dora_dist.data.features import pooled_in_time
from dora_dist.data.pictures import PictureReader
from dora_dist.extraction.items import Item
from dora_dist.extraction.options import ExtractionOptions, Outcome
from dora_dist.models.vision_tower import VisionTower
from dora_dist.runtime.errors import UserError

_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg"
"""Kinds of files that FFmpeg opens for us: none that is a list of other files or addresses."""
_EARLY = 1e-6
"""Seconds that a frame may come before the time that is looked at: times in files are rounded."""


@dataclass(frozen=True)
class VideoExtractor:
    """A video becomes one vector for each frame, at most `most_frames`: of a longer one, neighbours are pooled to
    their maximum (as VL-Adapter's code makes the features that VL-BART is trained with)."""

    tower: VisionTower
    reader: PictureReader
    options: ExtractionOptions

    def settings(self) -> dict[str, Any]:
        own = {"frames_per_second": self.options.frames_per_second, "most_frames": self.options.most_frames}
        return {**self.tower.settings(), **own}

    def check(self) -> None:
        self.tower.embedding(torch.zeros(1, 3, self.tower.side, self.tower.side))

    def outcomes(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """A batch of frames is in memory at a time, and those that loader processes have read ahead."""
        device = self.tower.model.device
        loader: DataLoader[_Piece] = DataLoader(
            _Frames(items, self.reader, self.options),
            batch_size=None,
            num_workers=self.options.num_workers,
            pin_memory=device.type == "cuda",
        )
        vectors: dict[int, list[Tensor]] = defaultdict(list)
        for number, pixels, why in loader:
            if pixels is not None:
                vectors[number].append(self.tower.embedding(pixels.to(device, non_blocking=True)).float())
                continue
            own = vectors.pop(number, [])
            if why:
                yield items[number], UserError(why)
            else:
                pooled = pooled_in_time(torch.cat(own), self.options.most_frames)
                yield items[number], {"features": pooled.cpu().numpy()}


_Piece = tuple[int, Tensor | None, str]
"""An item's number with pixels of its next frames, (b, 3, side, side); without any it has ended, perhaps with why it
cannot be read."""


class _Frames(IterableDataset[_Piece]):
    """Frames of each item, a batch at a time; each of several loader processes takes every n-th item."""

    def __init__(self, items: Sequence[Item], reader: PictureReader, options: ExtractionOptions) -> None:
        self._items, self._reader, self._options = items, reader, options

    def __iter__(self) -> Iterator[_Piece]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self._items), step):
            why = ""
            try:
                for pixels in self._pixels(self._reader.folder / self._items[number].path):
                    yield number, pixels, ""
            except UserError as error:
                why = str(error)
            yield number, None, why

    def _pixels(self, file: Path) -> Iterator[Tensor]:
        frames = read_frames(file, self._options.frames_per_second, self._reader)
        while some := [self._reader.pixels(image) for image in islice(frames, self._options.batch_size)]:
            yield torch.stack(some)


def read_frames(file: Path, per_second: float, reader: PictureReader) -> Iterator[Any]:
    """Frames of a video's first picture stream as RGB pictures of Pillow: the first, then one each 1/per_second s.

    They stand upright, as the file says that they are shown. Raises UserError for a file that is missing, not a video,
    damaged, without a frame, or has a frame that is larger than `reader` takes.
    """
    import av

    # A file that is a play list would make FFmpeg open others, of this machine or of a network.
    only = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    count, due = 0, 0.0
    try:
        with av.open(str(file), options=only) as container:
            if not container.streams.video:
                raise UserError(f"video {file} has no pictures in it, only sound or text")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            reader.check_size(file, stream.width, stream.height)
            for time, frame in _timed(container.decode(stream), float(stream.average_rate or 25)):
                count += 1
                reader.check_size(file, frame.width, frame.height)  # which may change, whatever the header says
                if time >= due - _EARLY:
                    due = (math.floor(time * per_second + _EARLY) + 1) / per_second
                    image = frame.to_image()
                    yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
    except av.FFmpegError as error:
        raise UserError(f"video {file} cannot be read: {error.strerror or error}") from error
    if not count:
        raise UserError(f"video {file} holds no frame")


def _timed(frames: Iterator[Any], rate: float) -> Iterator[tuple[float, Any]]:
    """Each frame with its seconds after the first; by `rate`, frames a second, where the file does not say."""
    start = None
    for number, frame in enumerate(frames):
        time = number / rate if frame.time is None else frame.time
        start = time if start is None else start
        yield time - start, frame
