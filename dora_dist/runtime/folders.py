"""Folders and files that appear whole or not at all, and errors of a disk that cannot take them, in words."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dora_dist.runtime.errors import UserError

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def disk_errors(path: Path, only: Sequence[int] = ()) -> Iterator[None]:
    """Turn OSErrors (all, or error numbers `only`) raised while `path` is written into a UserError."""
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        reason = error.strerror or str(error)
        remedy = "free some space or choose another place; nothing was left under that name"
        raise UserError(f"{path}: cannot be written: {reason}; {remedy}") from error


MODEL_MARKS = ("model*.safetensors",)
"""What shows that a folder holds a model, which another may replace."""
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
)
"""What a tokenizer is made of; no other "token" files, which may hold someone's access."""


def check_output(
    output: Path, inputs: Mapping[str, Path], *, what: str = "a model", marks: Sequence[str] = MODEL_MARKS
) -> None:
    """Raise UserError where what is written to the folder `output` would replace one of `inputs` (what each is, and its
    file or folder), lie in one, or replace a folder that holds something else than `what`: no file matches any of the
    patterns `marks`.
    """
    output = Path(output).resolve()
    for kind, place in inputs.items():
        place = place.resolve()
        if place.is_relative_to(output):
            raise UserError(f"{output}: holds the {kind} that is to be read; choose another output folder")
        if output.is_relative_to(place):
            raise UserError(f"{output}: lies in the {kind} {place}, which must stay as it is; choose another folder")
    held = os.path.isdir(output) and any(output.iterdir())
    if held and not any(found for mark in marks for found in output.glob(mark)):
        raise UserError(f"{output}: already exists and does not hold {what}; choose another output folder")


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to fill; it becomes `path` only when the block ends well.

    Everything is flushed to disk before the rename. On failure nothing is left, and an existing folder stays
    as it was. Raises UserError when `path` exists and `overwrite` is False, and when the disk is full.
    """
    path = Path(path).resolve()
    if os.path.exists(path) and not (overwrite and path.is_dir()):
        remedy = "choose another name, or replace it with --overwrite" if path.is_dir() else "choose another"
        raise UserError(f"{path}: already exists; {remedy}")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)  # a killed process that had this id left it
            partial.mkdir()
        with disk_errors(path, only=DISK_IS_FULL):  # the caller's block may also fail to read something
            yield partial
        with disk_errors(path):
            for folder, _, files in os.walk(partial):
                for name in (*files, "."):
                    fsync(Path(folder, name))
            _swap_in(partial, path)
            fsync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fsync(path: Path) -> None:
    """Return once a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; a folder already there is renamed first, and removed only afterwards."""
    if not path.exists():
        os.rename(partial, path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


@contextmanager
def new_file(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write, which becomes `path` when the block ends well, else is removed.

    alone: no other process writes `path` meanwhile, so that what a killed one left is written over.
    """
    partial = path.with_name(f".{path.name}.partial" + ("" if alone else f"-{os.getpid()}"))
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON; readers see the old file or the new one."""
    with new_file(path, alone=True) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, which ends with `remedy`, for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    return value
