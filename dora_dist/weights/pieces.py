"""Tensors of which several files hold a flat piece each, read as if they were whole."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from dora_dist.runtime.errors import UserError
from dora_dist.weights.safetensors_io import TensorEntry, TensorFolder

_OPEN_FILES = 64
"""Descriptors that are kept at most: a checkpoint may have thousands of files, a process often 1,024 descriptors."""


class _OpenFile:
    """A file to read, closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


class PiecedFolder(TensorFolder):
    """A folder whose tensors are cut: the row-major flattened tensor is its pieces, in the order of the files.

    `entries` are the whole tensors, each with the place of its first piece. No file says how many others there are,
    so a tensor may be absent from some, and any range of it can be read, however it was cut. Files stay open between
    reads: each holds pieces of all the tensors.
    """

    def __init__(self, path: Path, entries: dict[str, TensorEntry], pieces: Mapping[str, list[TensorEntry]]) -> None:
        super().__init__(path, entries)
        self._pieces = pieces
        self._open_file = lru_cache(_OPEN_FILES)(_OpenFile)

    @classmethod
    def of_headers(
        cls, path: Path, headers: Sequence[Mapping[str, TensorEntry]], shapes: Mapping[str, tuple[int, ...]]
    ) -> PiecedFolder:
        """The tensors of files in the folder `path`, which are in `headers` (`read_header`), with the shapes that they
        have whole.

        Raises UserError where the pieces of a tensor are not as many elements as its shape has.
        """
        pieces: dict[str, list[TensorEntry]] = {}
        for header in headers:
            for name, piece in header.items():
                pieces.setdefault(name, []).append(piece)
        entries = {}
        for name, shape in shapes.items():
            found = pieces.setdefault(name, [])
            held, numel = sum(piece.numel for piece in found), math.prod(shape)
            if held != numel or not found:
                raise UserError(
                    f"{path}: {len(headers)} files hold {held:,} elements of {name!r}, which has {numel:,}; they are "
                    "not of one checkpoint, or not all of it"
                )
            entries[name] = replace(found[0], shape=shape, nbytes=sum(piece.nbytes for piece in found))
        return cls(path, entries, pieces)

    def pieces(self, name: str) -> Sequence[TensorEntry]:
        return self._pieces[name]

    @contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        file = self._open_file(path)  # referred to while it is read, whatever is opened meanwhile
        yield file.descriptor
