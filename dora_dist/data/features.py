"""Visual features of pictures and of videos, from files that were made beforehand.

Pictures: an HDF5 file with a group for each, `{id}/features` (L, d) and, if known, `{id}/boxes` (L, 4); or a folder of
`{id}.h5`, each with the group of its picture. Videos: a folder of `{id}.npz`, each with `features` (T, d). Nothing in
them is unpickled, no link in them is followed, and no array is read before its size is known.
"""

from __future__ import annotations

import math
import os
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

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
"""Frames of a video as the model sees it."""
MOST_NUMBERS = 2**26
"""Most numbers of an array that is read, 256 MiB in fp32: what is larger are not features of one picture or video."""
HDF5_SUFFIXES = (".h5", ".hdf5")
MADE_WITH = "extraction"
"""An attribute of an HDF5 file, and a .json in a folder of npz: with what settings extract-features made it."""
DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, SyntaxError, MemoryError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""What reading a damaged file raises: numpy parses its header before the checksum is compared."""


class Visual(NamedTuple):
    """One picture or video: features (v, d) fp32, and boxes (v, 4) fp32, x1 y1 x2 y2 as shares of the picture."""

    features: Tensor
    boxes: Tensor


About = Literal["pictures", "videos"]


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """A UserError that begins with `what` for all that reading a damaged file raises."""
    try:
        yield
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{what} cannot be read: {error}") from error


class FeatureFile(ABC):
    """Features of many pictures or videos by id. Can be handed to loader processes: each opens it for itself.

    of: what it has features of. most: of one id, as the model sees it.
    """

    of: ClassVar[About]
    most: ClassVar[int]

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def ids(self) -> set[str]:
        """What it has features of. Raises UserError where it cannot be read."""

    def __call__(self, id: str) -> Visual:
        """Raises UserError, naming file and id, for what is not finite numbers (L, d)."""
        what = f"{self.path}: the features of {id!r}"
        with _readable(what):
            features, boxes = self._read(id, what)
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
        """Features (L, d) fp32, and boxes (L, 4) fp32 if there are any. `what` begins messages. Raises DAMAGED."""

    @abstractmethod
    def _reduced(self, features: Tensor, boxes: Tensor | None, what: str) -> Visual:
        """To as many as the model sees."""


class OfPictures(FeatureFile):
    """A square grid is max-pooled to 6 x 6; 36 regions stay as they are, with their boxes if any."""

    of, most = "pictures", REGIONS

    def _reduced(self, features: Tensor, boxes: Tensor | None, what: str) -> Visual:
        count, width = features.shape
        if boxes is not None and not boxes.any():
            boxes = None  # of no region: what stands for boxes that are not known, in whatever shape
        if boxes is not None:
            _check_boxes(boxes, count, what)
        if count == REGIONS:
            return Visual(features, torch.zeros(count, 4) if boxes is None else boxes)
        side = math.isqrt(count)
        if side * side != count or side < GRID:
            raise UserError(
                f"{what} are {count} regions, which are not a square grid of {GRID} x {GRID} or more; give {REGIONS} "
                "regions, or a grid such as 7 x 7 without the class token"
            )
        pooled = F.adaptive_max_pool2d(features.T.reshape(1, width, side, side), GRID)
        return Visual(pooled.reshape(width, REGIONS).T.contiguous(), torch.zeros(REGIONS, 4))


class Folder(FeatureFile):
    """A folder with a file for each id, named by it."""

    suffix: ClassVar[str]

    def ids(self) -> set[str]:
        with _readable(self.path):
            names = [entry.name for entry in os.scandir(self.path)]
        return {name.removesuffix(self.suffix) for name in names if name.endswith(self.suffix)}

    def made_with(self) -> str:
        file = Path(self.path) / f"{MADE_WITH}.json"
        with _readable(str(file)):
            return file.read_text(encoding="utf-8") if file.is_file() and not file.is_symlink() else ""

    def _file(self, id: str, what: str) -> Path:
        if id != Path(id).name or id in ("", ".", ".."):
            raise UserError(f"{what} cannot be read: an id is the name of a file in that folder, without {self.suffix}")
        path = Path(self.path) / f"{id}{self.suffix}"
        if path.is_symlink():
            raise UserError(f"{what} cannot be read: {path.name} is a link, which is not followed; copy the file")
        return path


class PictureFeatures(OfPictures):
    """An HDF5 file with a group for each picture."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._opened: tuple[int, Any] | None = None  # by which process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def ids(self) -> set[str]:
        with _readable(self.path), _hdf5(self.path) as file:
            return set(file)

    def made_with(self) -> str:
        with _readable(self.path), _hdf5(self.path) as file:
            said = file.attrs.get(MADE_WITH)
        return said if isinstance(said, str) else ""

    def close(self) -> None:
        if self._opened is not None and self._opened[0] == os.getpid():
            self._opened[1].close()
        self._opened = None

    def _read(self, id: str, what: str) -> tuple[Tensor, Tensor | None]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), _hdf5(self.path)
        return _of_picture(self._opened[1], id, what)


class PictureFolder(Folder, OfPictures):
    """A folder of `{id}.h5`, each with the group of its picture, as VL-BART's authors have them."""

    suffix = ".h5"

    def _read(self, id: str, what: str) -> tuple[Tensor, Tensor | None]:
        with _hdf5(str(self._file(id, what))) as file:
            return _of_picture(file, id, what)


class VideoFeatures(Folder):
    """A folder of `{id}.npz`. A video has 64 frames: more are max-pooled to 64 stretches of time, fewer are followed by
    zeros, which the model reads as it reads frames; boxes are 0.
    """

    of, most, suffix = "videos", FRAMES, ".npz"

    def _read(self, id: str, what: str) -> tuple[Tensor, Tensor | None]:
        with zipfile.ZipFile(self._file(id, what)) as archive:
            if "features.npy" not in archive.namelist():
                raise UserError(f'{what} are missing: the file has no array "features"')
            with archive.open("features.npy") as array:
                _check(*_header(array), what)
            with archive.open("features.npy") as array:
                values = numpy.lib.format.read_array(array, allow_pickle=False)
        return torch.from_numpy(values.astype(numpy.float32)), None

    def _reduced(self, features: Tensor, boxes: Tensor | None, what: str) -> Visual:
        pooled = pooled_in_time(features, FRAMES)
        return Visual(F.pad(pooled, (0, 0, 0, FRAMES - len(pooled))), torch.zeros(FRAMES, 4))


def pooled_in_time(frames: Tensor, most: int) -> Tensor:
    """(t, d) to (min(t, most), d): of more, the maximum over each of `most` stretches of time."""
    return frames if len(frames) <= most else F.adaptive_max_pool1d(frames.T[None], most)[0].T.contiguous()


def is_hdf5(path: str) -> bool:
    """Whether a file of features is HDF5, by its name."""
    return path.lower().endswith(HDF5_SUFFIXES)


class FeatureFiles:
    """The files of one kind of record, looked through in order."""

    def __init__(self, paths: Sequence[str], field: str, *, of: About) -> None:
        """field: of the configuration, for messages. of: what all of them must have features of.

        Raises UserError for a path that is none of the three kinds, or of the other subject.
        """
        self.field, self.paths = field, list(paths)
        self.files = [_opened(path, f'{field} = "{path}"') for path in paths]
        for file in self.files:
            if file.of != of:
                raise UserError(
                    f'{field} = "{file.path}": has features of {file.of}, and its records are about {of}; give those '
                    "of each task in data.features"
                )

    def located(self, ids: Sequence[str]) -> Tensor:
        """(n,) int64: which file has the features of each id; -1: none. Raises UserError."""
        place = torch.full((len(ids),), -1)
        for number in reversed(range(len(self.files))):
            known = self.files[number].ids()
            place[torch.tensor([id in known for id in ids], dtype=torch.bool)] = number
        return place


KINDS = (
    f"an HDF5 file ({', '.join(HDF5_SUFFIXES)}) or a folder of .h5 files (pictures), or a folder of .npz files (videos)"
)


def _opened(path: str, what: str) -> FeatureFile:
    if Path(path).is_dir():
        with _readable(what):
            suffixes = {Path(entry.name).suffix for entry in os.scandir(path)}
        kinds = [kind for kind in (PictureFolder, VideoFeatures) if kind.suffix in suffixes]
        if len(kinds) != 1:
            held = "both .h5 and .npz files" if kinds else "no .h5 or .npz file"
            raise UserError(f"{what}: the folder holds {held}; give {KINDS}")
        return kinds[0](path)
    if not is_hdf5(path):
        raise UserError(f"{what}: is none of what features are read from; give {KINDS}")
    if not Path(path).is_file():
        raise UserError(f"{what}: no such file; `dora-dist extract-features` makes one")
    return PictureFeatures(path)


# --- arrays -----------------------------------------------------------------------------------------------------------


def _hdf5(path: str) -> Any:
    """The file, open. Raises UserError."""
    extras.need("h5py", purpose=f"{path}: reading HDF5")
    import h5py

    try:
        return h5py.File(path, "r", locking=False)  # nobody writes it, and not every file system can lock
    except OSError as error:
        raise UserError(f"{path} cannot be read as HDF5: {error}") from error


def _of_picture(file: Any, id: str, what: str) -> tuple[Tensor, Tensor | None]:
    """Features (L, d), and boxes (L, 4) if any, of the group `id` of an open HDF5 file."""
    group = _inside(file, id, what)
    features = _dataset(_inside(group, "features", what), f'{what} ("features")')
    return features, _dataset(_inside(group, "boxes", what), f'{what} ("boxes")') if "boxes" in group else None


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


def _dataset(values: Any, what: str) -> Tensor:
    """(L, d) fp32 of a member of a group. Raises UserError for anything else."""
    if not hasattr(values, "shape"):
        raise UserError(f"{what} must be floating-point numbers (L, d), found a group")
    _check(values.shape, values.dtype, what)
    return torch.from_numpy(numpy.asarray(values[()], dtype=numpy.float32))


def _header(array: Any) -> tuple[tuple[int, ...], numpy.dtype[Any]]:
    """Shape and dtype that an open .npy says it has."""
    version = numpy.lib.format.read_magic(array)
    read = numpy.lib.format.read_array_header_1_0 if version == (1, 0) else numpy.lib.format.read_array_header_2_0
    shape, _, dtype = read(array)
    return shape, dtype


def _check(shape: tuple[int, ...] | None, dtype: numpy.dtype[Any], what: str) -> None:
    """Raise UserError for what is not numbers (L, d), and for more of them than one picture or video can have."""
    if shape is None or len(shape) != 2 or 0 in shape or dtype.kind != "f":
        raise UserError(f"{what} must be floating-point numbers (L, d), found {dtype} {shape}")
    if math.prod(shape) > MOST_NUMBERS:
        raise UserError(
            f"{what} are {shape[0]:,} of {shape[1]:,} numbers each, more than one picture or video can have"
        )


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
    if not (boxes[:, 2:] >= boxes[:, :2]).all():
        raise UserError(f"{what} have boxes that end before they begin; give x1, y1, x2, y2 in this order")
