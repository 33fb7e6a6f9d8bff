"""The manifest of a checkpoint: every file's size and checksum, and a checksum of its own; written last."""

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dora_dist.config.files import new_run_from
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import write_json

MANIFEST, ADAPTER = "manifest.json", "adapter"
FORMAT, FORMAT_OF_SHARDS = 2, 3
"""The state in one file, which earlier versions read as well, or in a file of each rank (`state.py`)."""
NAME = re.compile(r"checkpoint-(\d+)")
"""A checkpoint folder's name; the number is its optimizer step."""


class Damaged(UserError):
    """A checkpoint that is not, byte for byte, what was written; an earlier one may be."""


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint's manifest is there and every file it lists has the size it lists."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_manifest(
    folder: Path, fields: dict[str, Any], *, form: int = FORMAT, known: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Write manifest.json over everything else in the folder: sizes in bytes and sha256 of each file, and of itself.

    `form` is the format; `known` are entries (`file_entry`) of files by name that those who wrote them have made, which
    are listed whether or not they show in the folder's listing: a file server's may be old. Raises UserError for one
    that is not there as it was written.
    """
    listed = dict(known or {})
    for name, entry in listed.items():
        _check_seen(folder / name, entry["bytes"])
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    listed |= {name: file_entry(path) for name, path in files.items() if name not in listed and path.name != MANIFEST}
    manifest = {"format": form, **fields, "files": dict(sorted(listed.items()))}
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    write_json(folder / MANIFEST, {**manifest, "sha256": _own_digest(manifest)})


def _check_seen(path: Path, nbytes: int) -> None:
    """Raise UserError where a file that another rank has written is not seen here."""
    found = path.stat().st_size if path.is_file() else None
    if found != nbytes:
        there = "is not there" if found is None else f"has {found:,} bytes"
        raise UserError(
            f"checkpoint.run_dir: {path} {there} for rank 0, and was written with {nbytes:,} bytes; the run folder has "
            "to be on a file system that all nodes share"
        )


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size and its checksum."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def read_manifest(folder: Path, verify: bool = True) -> dict[str, Any]:
    """A checkpoint's manifest. Raises Damaged naming what is missing or damaged; UserError for a manifest that was
    edited or is of an unknown format, and for a folder that was renamed.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(
            f"checkpoint.resume: {folder} is not a complete checkpoint (no readable {MANIFEST}: {error})"
        ) from error
    _check_manifest(folder, manifest)
    _check_files(folder, files, verify)
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if not path.is_dir() and name not in files and name != MANIFEST:
            raise Damaged(f"checkpoint.resume: {path} does not belong to the checkpoint; move it elsewhere")
    return manifest


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], verify: bool) -> None:
    """Raise Damaged unless every file that is listed is there, of its size, and if `verify` with its checksum."""
    for name, listed in files.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"checkpoint.resume: {folder / MANIFEST} lists {name!r}, which leaves the folder")
        if not path.is_file():
            raise Damaged(f"checkpoint.resume: {path} is missing; resume from another checkpoint")
        if path.stat().st_size != listed["bytes"]:
            raise _damaged(path)
    if not verify:
        return
    with ThreadPoolExecutor() as pool:  # a large state is many files of gigabytes
        sums = pool.map(sha256, [folder / name for name in files])
        for (name, listed), found in zip(files.items(), sums, strict=True):
            if found != listed["sha256"]:
                raise _damaged(folder / name)


def _damaged(path: Path) -> Damaged:
    return Damaged(f"checkpoint.resume: {path} is damaged (size or checksum); resume from another checkpoint")


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise UserError unless the manifest is as this version wrote it, for the folder's own name."""
    written = manifest.get("format")
    if written not in (FORMAT, FORMAT_OF_SHARDS):
        # Only that version can merge a checkpoint without an adapter: its state is in that format.
        other = f", or {new_run_from(folder)}" if (folder / ADAPTER).is_dir() else ""
        raise UserError(
            f"checkpoint.resume: {folder} has format {written}, this version of dora_dist reads {FORMAT} and "
            f"{FORMAT_OF_SHARDS}; use the version that wrote it{other}"
        )
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    if manifest.get("sha256") != _own_digest(content):
        raise UserError(
            f"checkpoint.resume: {folder / MANIFEST} was changed after it was written (its own checksum differs); put "
            "it back as it was, or resume from another checkpoint"
        )
    name, step = NAME.fullmatch(folder.name), manifest.get("step")
    if name and int(name[1]) != step:
        raise UserError(
            f"checkpoint.resume: {folder} was renamed: it holds step {step}; name it checkpoint-{step} again"
        )


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
