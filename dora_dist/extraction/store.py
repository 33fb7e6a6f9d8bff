"""Where features are kept: videos' in a folder with one .npz each, pictures' in an HDF5 file made of such a folder.

HDF5 does not survive a process that is killed while it writes. So features are first written one .npz each, under a
temporary name that is then changed, into a folder that is named after the file; when all are there, the file is made of
them and appears whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from dora_dist.data.features import DAMAGED, HDF5_SUFFIXES, MADE_WITH, is_hdf5
from dora_dist.extraction.items import Kind
from dora_dist.runtime import extras
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import DISK_IS_FULL, disk_errors, fsync, new_file, read_json_object

SETTINGS = f"{MADE_WITH}.json"
"""In a folder of features: how they were made. An HDF5 file has the same as its attribute."""
_ANOTHERS = "is there already and was not made by extract-features; choose another output"
_SKIPPED = ".skipped"
"""Ends the name of a file that says why an item has no features."""
Arrays = Mapping[str, NDArray[np.floating]]
"""What is kept of one item: "features" (L, d), and perhaps "boxes" (L, 4)."""


class FeatureFolder:
    """A folder of {name}.npz, each of which appears whole; several processes may fill one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, or go on with it. Raises UserError if its features were made with other settings."""
        file = self.folder / SETTINGS
        if file.is_file():
            there = read_json_object(file, f"delete {self.folder} and start the command again")
            check_settings(self.folder, there, settings)
            return
        if self.folder.exists() and not (self.folder.is_dir() and all(map(_hidden, self.folder.iterdir()))):
            raise UserError(f"{self.folder}: {_ANOTHERS}")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _appearing(file) as partial:
            partial.write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")

    def names(self) -> set[str]:
        """Those that have features."""
        return self._ending(".npz")

    def skipped(self) -> set[str]:
        """Those that have none because their files cannot be read."""
        return self._ending(_SKIPPED)

    def _ending(self, ending: str) -> set[str]:
        try:
            with os.scandir(self.folder) as files:
                names = [file.name for file in files]
        except FileNotFoundError:  # another part has made the HDF5 file of it
            return set()
        return {name.removesuffix(ending) for name in names if name.endswith(ending) and not name.startswith(".")}

    def write(self, name: str, features: Arrays) -> None:
        with _appearing(self.folder / f"{name}.npz") as file, file.open("wb") as sink:
            np.savez(sink, allow_pickle=False, **features)
        (self.folder / f"{name}{_SKIPPED}").unlink(missing_ok=True)  # of an earlier try

    def skip(self, name: str, why: str) -> None:
        with _appearing(self.folder / f"{name}{_SKIPPED}") as file:
            file.write_text(f"{why}\n", encoding="utf-8")

    def retry(self, names: Iterable[str]) -> None:
        """Of these, what could not be read before counts as not yet tried."""
        for name in names:
            (self.folder / f"{name}{_SKIPPED}").unlink(missing_ok=True)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / f"{name}.npz").unlink()

    def read(self, name: str) -> dict[str, NDArray[np.floating]]:
        file = self.folder / f"{name}.npz"
        with _damage(file), np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}


class FeatureStore:
    """The output of an extraction, which may be there in part."""

    def __init__(self, output: Path, settings: Mapping[str, Any], kind: Kind) -> None:
        """Raises UserError for an output that is something else, or was made with other settings."""
        self.output, self.settings = output, dict(settings)
        self.is_file = is_hdf5(output.name)
        if self.is_file != (kind == "image"):
            wanted = {"image": f"an HDF5 file, named {HDF5_SUFFIXES[0]}", "video": "a folder, of .npz files"}
            raise UserError(f"--output {output}: features of {kind}s are kept in {wanted[kind]}")
        if self.is_file:
            extras.need("h5py", purpose=f"--output {output}")
            _check_file(output, settings)
        self.parts = FeatureFolder(output.with_name(f"{output.name}.parts") if self.is_file else output)
        self._packed = output.with_name(f".{output.name}.parts.packed")  # parts that are being deleted

    def open(self, wanted: Iterable[str] = ()) -> set[str]:
        """Make what is not there yet; those of `wanted` that have no features.

        They count as not yet tried, so that no other part takes the work for done while this one reads them again.
        """
        with self._alone():
            self.parts.open(self.settings)
            missing = set(wanted) - self.names()
            self.parts.retry(missing)
            return missing

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What one process of several, each with its part, must do by itself."""
        lock = self.output.with_name(f".{self.output.name}.lock")
        with ExitStack() as stack:
            with disk_errors(self.output):
                lock.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(lock))
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    def names(self) -> set[str]:
        """All that have features."""
        return self.parts.names() | (_names_in(self.output) if self.is_file else set())

    def complete(self, wanted: Collection[str]) -> bool:
        """Make the HDF5 file if all of `wanted` are there or are skipped; whether that is so."""
        if not self.is_file:
            return not set(wanted) - self.names() - self.parts.skipped()
        with self._alone():
            skipped = self.parts.skipped() & set(wanted)
            if set(wanted) - self.names() - skipped:
                return False
            if new := self.parts.names():
                self._pack(sorted(new))
            if skipped:  # which must be known to a part that ends later, or is started again
                self.parts.delete(new)
            elif self.parts.folder.is_dir():  # or another part has just found the same
                shutil.rmtree(self._packed, ignore_errors=True)  # of a process that was killed here
                self.parts.folder.rename(self._packed)  # half a folder of parts would be taken for somebody else's
                shutil.rmtree(self._packed)
            return True

    def _pack(self, new: list[str]) -> None:
        """Make the file, or make it again with what is new; it replaces what was there only when it is on the disk."""
        import h5py

        with disk_errors(self.output, only=DISK_IS_FULL), new_file(self.output, alone=True) as partial:
            with h5py.File(partial, "w") as file:
                file.attrs[MADE_WITH] = json.dumps(self.settings)
                if self.output.exists():
                    with _damage(self.output), h5py.File(self.output, "r") as before:
                        for name in before:
                            if name not in new:
                                before.copy(name, file)
                for name in new:
                    group = file.create_group(name)
                    for key, values in self.parts.read(name).items():
                        group.create_dataset(key, data=values)
            fsync(partial)


def check_settings(place: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError, naming the first difference, where features of two kinds would get into one place."""
    for key in {**there, **wanted}:
        if there.get(key) != wanted.get(key):
            raise UserError(
                f"{place}: its features were made with {key} = {there.get(key)!r}, this command has "
                f"{wanted.get(key)!r}; give the same settings, or choose another output"
            )


def _check_file(output: Path, settings: Mapping[str, Any]) -> None:
    import h5py

    if not output.exists():
        return
    if not output.is_file() or not h5py.is_hdf5(output):
        raise UserError(f"{output}: is there already and is not an HDF5 file; choose another output")
    with _damage(output):
        with h5py.File(output, "r") as file:
            made = file.attrs.get(MADE_WITH)
        if not isinstance(made, str):
            raise UserError(f"{output}: {_ANOTHERS}")
        there = json.loads(made)
        if not isinstance(there, dict):
            raise ValueError("its settings are not a JSON object")
    check_settings(output, there, settings)


@contextmanager
def _damage(place: Path) -> Iterator[None]:
    """Name the file whose damage keeps it from being read. A full disk is not damage."""
    try:
        yield
    except UserError:
        raise
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            raise
        raise UserError(f"{place}: is damaged ({error}); delete it and start the command again") from error


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A file to write, which gets its own name when it is whole, on the disk."""
    with disk_errors(target, only=DISK_IS_FULL), new_file(target) as partial:
        yield partial
        fsync(partial)


def _hidden(path: Path) -> bool:
    """Unfinished files of other processes."""
    return path.name.startswith(".")


def _names_in(output: Path) -> set[str]:
    import h5py

    if not output.exists():
        return set()
    with _damage(output), h5py.File(output, "r") as file:
        return set(file)
