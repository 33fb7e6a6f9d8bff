"""Safetensors files by byte range: headers once, then only the bytes that were asked for.

Reads use pread into the caller's memory rather than mmap, whose pages would count as a rank's resident memory. Writes
stream one tensor at a time, and a file gets its name once it is whole.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import disk_errors

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_STAGING_BYTES = 16 << 20
_PIECE_ELEMENTS = 4 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies on disk; `offset` is in bytes from the start of the file `path`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TensorFolder:
    """The tensors of a model folder (one file, or an index and its shards), readable by element range.

    `entries` maps names to places in files; `bytes_read` counts the tensor bytes really read so far.
    """

    def __init__(self, path: Path, entries: dict[str, TensorEntry]) -> None:
        self.path = path
        self.entries = entries
        self.bytes_read = 0

    @classmethod
    def open(cls, path: Path, stem: str = "model") -> TensorFolder:
        """Read and check all headers of folder `path` (`<stem>.safetensors`, or its index), or of one file.

        Raises UserError when a file is missing, truncated or malformed, or an index does not fit its files.
        """
        path = Path(path)
        if path.is_file():
            return cls(path, read_header(path))
        if not path.is_dir():
            raise UserError(f"{path}: no such file or folder; give a folder that holds {stem}.safetensors")
        single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
        if single.is_file():
            return cls(path, read_header(single))
        if index.is_file():
            return cls(path, _read_index(index))
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        remedy = (
            "it holds pickled weights only, which are never loaded: save the model as safetensors first"
            if pickled
            else f"expected {single.name} or {index.name}"
        )
        raise UserError(f"{path}: no safetensors weights in this folder; {remedy}")

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor `name` lies. Raises UserError, with the nearest name, if there is none."""
        if name not in self.entries:
            raise UserError(f"{self.path}: no tensor named {name!r}{did_you_mean(name, self.entries)}")
        return self.entries[name]

    def read_flat(
        self, name: str, start: int, stop: int, out: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Elements [start, stop) of the row-major flattened tensor; no other byte of the file is read.

        `out`, where given, is a 1-D contiguous CPU tensor of stop − start elements and decides the dtype;
        otherwise the result has `dtype` (None: as on disk).
        """
        entry = self.entry(name)
        if not 0 <= start <= stop <= entry.numel:
            raise ValueError(f"{name}: elements [{start}, {stop}) of {entry.numel}")
        if out is None:
            out = torch.empty(stop - start, dtype=dtype or entry.dtype)
        if out.shape != (stop - start,) or not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError(f"{name}: out must be a contiguous CPU tensor of shape ({stop - start},)")
        first = 0
        for piece in self.pieces(name):
            begin, end = max(start, first), min(stop, first + piece.numel)
            if begin < end:
                with self._opened(piece.path) as descriptor:
                    _read_piece(descriptor, piece, begin - first, out.detach()[begin - start : end - start])
            first += piece.numel
        self.bytes_read += (stop - start) * entry.dtype.itemsize
        return out

    def pieces(self, name: str) -> Sequence[TensorEntry]:
        """Where the flattened tensor lies, from its first element to its last: here in one place."""
        return [self.entry(name)]

    @contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        """A descriptor to read a file by."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor in its shape, as `dtype` (None: as on disk)."""
        entry = self.entry(name)
        return self.read_flat(name, 0, entry.numel, dtype=dtype).view(entry.shape)

    def in_pieces(self, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """The flattened tensor piece by piece, for memory that does not grow with it."""
        numel = self.entry(name).numel
        for start in range(0, numel, _PIECE_ELEMENTS):
            yield self.read_flat(name, start, min(start + _PIECE_ELEMENTS, numel), dtype=dtype)

    def read_finite(self, name: str) -> Tensor:
        """A whole tensor that was trained, fp32. Raises UserError, naming it, where a number is not finite."""
        values = self.read(name, dtype=torch.float32)
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise UserError(
                f"{self.entries[name].path}: tensor {name!r} holds {bad:,} numbers that are NaN, infinite or "
                "too large for fp32: training diverged before it was saved; use an earlier checkpoint"
            )
        return values


class TensorWriter:
    """Streams one safetensors file, with no memory beyond the caller's tensors.

    Use as a context manager: the file takes its name only after every tensor was written whole and flushed.
    `layout` lists (name, dtype, shape) of every tensor. A write that the system refuses raises UserError.
    """

    def __init__(
        self,
        path: Path,
        layout: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        self._dtypes = {name: dtype for name, dtype, _ in layout}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._next: dict[str, int] = {}  # byte within the data section where a tensor's next piece goes
        self._end: dict[str, int] = {}
        position = 0
        # Widest dtype first, so that every tensor starts at a multiple of its element size: readers that map
        # the file need that. The order of the write() calls stays free.
        for name, dtype, shape in sorted(layout, key=lambda item: -item[1].itemsize):
            if name in self._next:
                raise ValueError(f"{name}: listed twice in the layout")
            self._next[name], position = position, position + math.prod(shape) * dtype.itemsize
            self._end[name] = position
            offsets = [self._next[name], position]
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._head = struct.pack("<Q", len(encoded)) + encoded
        self._descriptor = -1

    def __enter__(self) -> TensorWriter:
        with disk_errors(self.path):
            self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _pwrite(self._descriptor, memoryview(self._head), 0)
            except OSError:
                self._abandon()
                raise
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append `tensor` (of the declared dtype) to `name`: the whole of it, or its next flat piece."""
        if tensor.dtype != self._dtypes[name]:
            raise ValueError(f"{name}: declared as {self._dtypes[name]}, given {tensor.dtype}")
        data = _bytes_of(tensor.detach().cpu().contiguous().view(-1))
        if self._next[name] + len(data) > self._end[name]:
            raise ValueError(f"{name}: more elements than declared")
        with disk_errors(self.path):
            _pwrite(self._descriptor, data, len(self._head) + self._next[name])
        self._next[name] += len(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        unfinished = [name for name, end in self._end.items() if self._next[name] != end]
        if kind is not None or unfinished:
            self._abandon()
            if kind is None:
                raise ValueError(f"{self.path}: tensors not written whole: {unfinished[:5]}")
            return
        try:
            with disk_errors(self.path):
                os.fsync(self._descriptor)
                os.replace(self._partial, self.path)
        except BaseException:
            self._abandon()
            raise
        os.close(self._descriptor)

    def _abandon(self) -> None:
        os.close(self._descriptor)
        self._partial.unlink(missing_ok=True)


def _read_piece(descriptor: int, piece: TensorEntry, start: int, out: Tensor) -> None:
    """Elements of one place on disk, from `start` on, into `out` (1-D, contiguous, on the CPU), in its dtype."""
    itemsize = piece.dtype.itemsize
    if out.dtype == piece.dtype:
        _pread_into(descriptor, out, piece, start * itemsize)
        return
    chunk = min(_STAGING_BYTES // itemsize, out.numel())
    staging = torch.empty(chunk, dtype=piece.dtype)
    for first in range(0, out.numel(), chunk):
        part = staging[: min(chunk, out.numel() - first)]
        _pread_into(descriptor, part, piece, (start + first) * itemsize)
        out[first : first + part.numel()].copy_(part)


def did_you_mean(name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    """The tail of an error message: "; did you mean 'x'?", or nothing when no known name is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of one safetensors file. UserError unless they tile the file exactly, from end to end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > _MAX_HEADER_BYTES or 8 + length > size:
            reason = f"header of {length:,} bytes, file of {size:,}"
            raise _broken(path, f"not a safetensors file, or truncated ({reason})")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise _broken(path, "not a safetensors file (its header is not JSON)") from error
    if not isinstance(header, dict):
        raise _broken(path, "not a safetensors file (its header is not a JSON object)")
    header.pop("__metadata__", None)
    entries = [_parse_entry(path, 8 + length, name, fields) for name, fields in header.items()]
    position = 8 + length
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise _broken(path, f"tensor {entry.name!r} overlaps another or leaves a gap")
        position += entry.nbytes
        if position > size:
            missing = f"{position - size:,} bytes of tensor {entry.name!r} are missing"
            raise _broken(path, f"truncated, {missing}")
    if position != size:
        raise _broken(path, f"{size - position:,} bytes after the last tensor")
    return {entry.name: entry for entry in entries}


def _parse_entry(path: Path, data_start: int, name: str, fields: Any) -> TensorEntry:
    try:
        dtype_name, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        sane = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _broken(path, f"malformed header entry of tensor {name!r}") from error
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        known = f"supported are {', '.join(DTYPES)}"
        raise UserError(f"{path}: tensor {name!r} has the unsupported dtype {dtype_name!r}; {known}")
    if not sane or math.prod(shape) * dtype.itemsize != end - begin:
        raise _broken(path, f"tensor {name!r} of shape {shape} does not fit bytes [{begin}, {end})")
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _read_index(index: Path) -> dict[str, TensorEntry]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: Path(index.parent, shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(index, "not a safetensors index (no weight_map)") from error
    headers: dict[Path, dict[str, TensorEntry]] = {}
    entries = {}
    for name, path in shards.items():
        shard = weight_map[name]
        # By name, not by resolved target: a hub cache is a folder of links into a store next to it.
        if shard != path.name or shard in ("", ".", ".."):
            raise UserError(f"{index}: tensor {name!r} is said to be in {shard!r}; use a plain file name")
        if path not in headers:
            if not path.is_file():
                raise UserError(f"{path}: missing, and {index.name} needs it for {name!r}; download it too")
            headers[path] = read_header(path)
        if name not in headers[path]:
            raise _broken(path, f"tensor {name!r} is not in it, though {index.name} says so")
        entries[name] = headers[path][name]
    return entries


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; download or copy the file again")


def _bytes_of(flat: Tensor) -> memoryview:
    """The memory of a contiguous 1-D CPU tensor; numpy does not know bfloat16, hence the byte view."""
    return flat.view(torch.uint8).numpy().data


def _pread_into(descriptor: int, out: Tensor, entry: TensorEntry, skip: int) -> None:
    buffer, position = _bytes_of(out), entry.offset + skip
    while len(buffer):  # one call moves at most 2 GiB
        count = os.preadv(descriptor, [buffer], position)
        if count == 0:
            raise _broken(entry.path, f"ended inside tensor {entry.name!r}")
        buffer, position = buffer[count:], position + count


def _pwrite(descriptor: int, data: memoryview, position: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count
