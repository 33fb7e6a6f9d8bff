"""Visual features of pictures and of videos, from files that were made beforehand.

Pictures: an HDF5 file with a group for each, `{id}/features` (L, d) and, if known, `{id}/boxes` (L, 4). Videos: a
folder of `{id}.npz`, each with `features` (T, d). Nothing in them is unpickled, and no link in them is followed.
"""

from __future__ import annotations

import math
import os
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.runtime import extras
from dora_dist.runtime.errors import UserError

GRID = 6
REGIONS = GRID * GRID
"""Regions of a picture as the model sees it (Liu et al., section 5.3)."""
FRAMES = 64
"""Most frames of a video as the model sees it."""
HDF5_SUFFIXES = (".h5", ".hdf5")
MADE_WITH = "extraction"
"""An attribute of an HDF5 file, and a .json in a folder of npz: with what settings extract-features made it."""
DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, SyntaxError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""What reading a damaged file raises: numpy parses its header before the checksum is compared."""


class Visual(NamedTuple):
    """One picture or video: features (v, d) fp32, and boxes (v, 4) fp32, x1 y1 x2 y2 as shares of the picture."""

    features: Tensor
    boxes: Tensor


class FeatureFile(ABC):
    """Features of many pictures or videos by id. Can be handed to loader processes: each opens it for itself.

    most: of one id, as the model sees it.
    """

    most: ClassVar[int]

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def ids(self) -> set[str]:
        """What it has features of. Raises UserError where it cannot be read."""

    def __call__(self, id: str) -> Visual:
        """Raises UserError, naming file and id, for what is not finite numbers (L, d)."""
        what = f"{self.path}: the features of {id!r}"
        try:
            features, boxes = self._read(id, what)
        except UserError:
            raise
        except DAMAGED as error:
            raise UserError(f"{what} cannot be read: {error}") from error
        if not torch.isfinite(features).all():
            raise UserError(f"{what} hold NaN or infinity; extract them again")
        return self._reduced(features, boxes, what)

    @abstractmethod
    def made_with(self) -> str:
        """The settings of the extraction that made it, as JSON; "" where it does not say. Raises UserError."""

    def close(self) -> None:
        """Let go of what is open; it is opened again when it is needed."""
        return

    @abstractmethod
    def _read(self, id: str, what: str) -> tuple[Tensor, Tensor | None]:
        """Features (L, d) fp32, and boxes (L, 4) fp32 if any; `what` begins messages. May raise one of DAMAGED."""

    @abstractmethod
    def _reduced(self, features: Tensor, boxes: Tensor | None, what: str) -> Visual:
        """To as many as the model sees."""


class PictureFeatures(FeatureFile):
    """An HDF5 file. A square grid is max-pooled to 6 x 6; 36 regions stay as they are, with their boxes if any."""

    most = REGIONS

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._opened: tuple[int, Any] | None = None  # by which process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def ids(self) -> set[str]:
        with self._open() as file:
            return set(file)

    def made_with(self) -> str:
        try:
            with self._open() as file:
                said = file.attrs.get(MADE_WITH)
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(f"{self.path} cannot be read: {error}") from error
        return said if isinstance(said, str) else ""

    def close(self) -> None:
        if self._opened is not None and self._opened[0] == os.getpid():
            self._opened[1].close()
        self._opened = None

    def _open(self) -> Any:
        extras.need("h5py", purpose=f"{self.path}: reading HDF5")
        import h5py

        try:
            return h5py.File(self.path, "r", locking=False)  # nobody writes it, and not every file system can lock
        except OSError as error:
            raise UserError(f"{self.path} cannot be read as HDF5: {error}") from error

    def _file(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), self._open()
        return self._opened[1]

    def _read(self, id: str, what: str) -> tuple[Tensor, Tensor | None]:
        group = _inside(self._file(), id, what)
        features = _numbers(_inside(group, "features", what), f'{what} ("features")')
        if "boxes" not in group:
            return features, None
        return features, _numbers(_inside(group, "boxes", what), f'{what} ("boxes")')

    def _reduced(self, features: Tensor, boxes: Tensor | None, what: str) -> Visual:
        count, width = features.shape
        if boxes is not None and not boxes.any():
            boxes = None  # of no region: what stands for boxes that are not known, in whatever shape
        if boxes is not None:
            _check_boxes(boxes, count, what)
        if count == REGIONS:
            return Visual(features, torch.zeros(count, 4) if boxes is None else boxes)
        side = math.isqrt(count)
        if side * side != count:
            raise UserError(
                f"{what} are {count} regions, which are not a square grid; give {REGIONS} regions, or a grid such as "
                "7 x 7 without the class token"
            )
        pooled = F.adaptive_max_pool2d(features.T.reshape(1, width, side, side), GRID)
        return Visual(pooled.reshape(width, REGIONS).T.contiguous(), torch.zeros(REGIONS, 4))


class VideoFeatures(FeatureFile):
    """A folder of `{id}.npz`. More than 64 frames are max-pooled to 64 stretches of time; boxes are 0."""

    most = FRAMES

    def ids(self) -> set[str]:
        try:
            return {entry.name.removesuffix(".npz") for entry in os.scandir(self.path) if entry.name.endswith(".npz")}
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def made_with(self) -> str:
        file = Path(self.path) / f"{MADE_WITH}.json"
        try:
            return file.read_text(encoding="utf-8") if file.is_file() and not file.is_symlink() else ""
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error

    def _read(self, id: str, what: str) -> tuple[Tensor, Tensor | None]:
        if id != Path(id).name or id in ("", ".", ".."):
            raise UserError(f"{what} cannot be read: an id is the name of a file in that folder, without .npz")
        path = Path(self.path) / f"{id}.npz"
        if path.is_symlink():
            raise UserError(f"{what} cannot be read: {path.name} is a link, which is not followed; copy the file")
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as archive:
            if "features" not in archive:
                raise UserError(f'{what} are missing: the file has no array "features"')
            return _numbers(archive["features"], what), None

    def _reduced(self, features: Tensor, boxes: Tensor | None, what: str) -> Visual:
        pooled = pooled_in_time(features, FRAMES)
        return Visual(pooled, torch.zeros(len(pooled), 4))


def pooled_in_time(frames: Tensor, most: int) -> Tensor:
    """(t, d) to (min(t, most), d): of more, the maximum over each of `most` stretches of time."""
    return frames if len(frames) <= most else F.adaptive_max_pool1d(frames.T[None], most)[0].T.contiguous()


def is_hdf5(path: str) -> bool:
    """Whether a file of features is HDF5, by its name."""
    return path.lower().endswith(HDF5_SUFFIXES)


class FeatureFiles:
    """The files of one kind of record, looked through in order."""

    def __init__(self, paths: Sequence[str], field: str) -> None:
        """field: of the configuration, for messages. Raises UserError for a path that is neither of the two kinds."""
        self.field, self.paths = field, list(paths)
        self.files = [_opened(path, field) for path in paths]

    def located(self, ids: Sequence[str]) -> Tensor:
        """(n,) int64: which file has the features of each id; -1: none. Raises UserError."""
        place = torch.full((len(ids),), -1)
        for number in reversed(range(len(self.files))):
            known = self.files[number].ids()
            place[torch.tensor([id in known for id in ids], dtype=torch.bool)] = number
        return place


def _opened(path: str, field: str) -> FeatureFile:
    if Path(path).is_dir():
        return VideoFeatures(path)
    if not is_hdf5(path):
        raise UserError(
            f'{field} = "{path}": is neither an HDF5 file ({", ".join(HDF5_SUFFIXES)}: features of pictures) nor a '
            "folder of .npz files (features of videos)"
        )
    if not Path(path).is_file():
        raise UserError(f'{field} = "{path}": no such file; `dora-dist extract-features` makes one')
    return PictureFeatures(path)


def _inside(group: Any, name: str, what: str) -> Any:
    """A member of an HDF5 group whose data is in the same file. Raises UserError, KeyError."""
    import h5py

    if not isinstance(group, h5py.Group):
        raise UserError(f'{what} cannot be read: expected a group with "features" (L, d)')
    if name not in group:
        raise UserError(f'{what} are missing: there is no "{name}"')
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise UserError(f'{what} cannot be read: "{name}" is a link, which is not followed; copy the data')
    found = group[name]
    if isinstance(found, h5py.Dataset) and (found.is_virtual or found.external):
        raise UserError(f'{what} cannot be read: "{name}" keeps its numbers in another file; copy the data')
    return found


def _numbers(values: Any, what: str) -> Tensor:
    """(L, d) fp32 of a dataset of h5py or an array. Raises UserError for anything else."""
    found = f"{values.dtype} {tuple(values.shape)}" if hasattr(values, "shape") else "a group"
    if not hasattr(values, "shape") or len(values.shape) != 2 or 0 in values.shape or values.dtype.kind != "f":
        raise UserError(f"{what} must be floating-point numbers (L, d), found {found}")
    return torch.from_numpy(numpy.asarray(values[()], dtype=numpy.float32))


def _check_boxes(boxes: Tensor, count: int, what: str) -> None:
    """Raise UserError for boxes that are not those of the regions the model sees."""
    if tuple(boxes.shape) != (count, 4) or count != REGIONS:
        raise UserError(
            f"{what} are {count} regions with boxes {tuple(boxes.shape)}: boxes must be ({REGIONS}, 4), those of "
            f"{REGIONS} regions; leave them out of a grid"
        )
    if not ((boxes >= 0) & (boxes <= 1)).all():
        raise UserError(
            f"{what} have boxes beyond 0 to 1; give x1, y1, x2, y2 as shares of the picture's width and height"
        )
