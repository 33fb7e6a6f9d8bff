"""What features are extracted of: pictures or videos, each with the name that its features get."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dora_dist.config.names import DATA_SUFFIXES
from dora_dist.config.source import absence
from dora_dist.data.records import read_records
from dora_dist.runtime.errors import UserError

Kind = Literal["image", "video"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    "video": (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"),
}
_LONGEST = 200
"""Characters of a name: with what is put around it, a file's name has at most 255 bytes."""


@dataclass(frozen=True)
class Item:
    """One picture or video: the name of its features, and its file below the folder of all."""

    id: str
    path: str


@dataclass(frozen=True)
class Items:
    """Items of one kind below `folder`, sorted by name."""

    kind: Kind
    folder: Path
    items: tuple[Item, ...]

    def part(self, number: int, of: int) -> Items:
        """Every `of`-th item, from the `number`-th on (counted from 1)."""
        return Items(self.kind, self.folder, self.items[number - 1 :: of])


def find_items(source: Path, folder: Path | None = None) -> Items:
    """The pictures, or the videos, that `source` means.

    source: a folder (everything below it, by the files' suffixes), one file, or a list of records
    (`config.names.DATA_SUFFIXES`) with "image" or "video", a path below `folder` (default: the list's folder), and
    perhaps "id"; without, an item is named by its file's stem. Raises UserError where there is nothing, where pictures
    and videos are mixed, where two files have one name, and for names and paths that would leave their folder.
    """
    if source.is_dir():
        if folder is not None:
            raise UserError(f"--image-folder {folder}: {source} is a folder itself; leave --image-folder out")
        return _items(source, [(str(source / path), Item(PurePosixPath(path).stem, path)) for path in _below(source)])
    if not source.is_file():
        raise UserError(
            f"{source}: {absence(source)}; give a folder of pictures or videos, a file, or a list of records"
        )
    if source.name.lower().endswith(DATA_SUFFIXES):
        return _items(folder or source.parent, list(_listed(source)))
    return _items(source.parent, [(str(source), Item(source.stem, source.name))])


def kind_of(path: str) -> Kind | None:
    """What a file is by its name."""
    suffix = PurePosixPath(path).suffix.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def _below(folder: Path) -> Iterator[str]:
    """Pictures and videos below a folder, relative to it; hidden files and folders are passed over."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and kind_of(name):
                yield Path(parent, name).relative_to(folder).as_posix()


def _listed(source: Path) -> Iterator[tuple[str, Item]]:
    for place, record in read_records([source], {}):
        named = [kind for kind in SUFFIXES if kind in record]
        if len(named) != 1 or not isinstance(record[named[0]], str):
            raise UserError(f'{place}: needs "image" or "video", the path of a file; "id" may name its features')
        path = record[named[0]]
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise UserError(f'{place}: "{named[0]}" is {path!r}, which is not below the folder; give --image-folder')
        yield place, Item(_id(record, path), path)


def _id(record: dict[str, Any], path: str) -> str:
    return str(record["id"]) if record.get("id") is not None else PurePosixPath(path).stem


def _items(folder: Path, found: Sequence[tuple[str, Item]]) -> Items:
    by_id: dict[str, Item] = {}
    for place, item in found:
        _check_id(place, item.id)
        other = by_id.setdefault(item.id, item)
        if other.path != item.path:
            raise UserError(
                f'{place}: {folder / item.path} and {folder / other.path} are both named "{item.id}"; give a list of '
                'records with an "id" each'
            )
    items = tuple(sorted(by_id.values(), key=lambda item: item.id))
    return Items(_kind(folder, items), folder, items)


def _kind(folder: Path, items: Sequence[Item]) -> Kind:
    """The one kind that all items are of."""
    first = {kind_of(item.path): item.path for item in reversed(items)}
    names = " or ".join(f"{kind} ({', '.join(suffixes)})" for kind, suffixes in SUFFIXES.items())
    if None in first:
        raise UserError(f"{folder / first[None]}: its name is not that of an {names}")
    if not first:
        raise UserError(f"{folder}: no {names} in it")
    if len(first) > 1:
        raise UserError(
            f"{folder}: has pictures ({first['image']}) and videos ({first['video']}); extract them one after the other"
        )
    [kind] = (kind for kind in first if kind)
    return kind


def _check_id(place: str, name: str) -> None:
    """Names become names of files, and of groups of HDF5, where "/" and "." have meanings of their own."""
    bad = next((sign for sign in name if sign in "/\\" or not sign.isprintable()), None)
    if not name or name.startswith(".") or bad is not None or len(name.encode()) > _LONGEST:
        raise UserError(
            f"{place}: the name {name!r} cannot be used: 1 to {_LONGEST} bytes without / and \\, not starting with a "
            'dot; give another "id"'
        )
