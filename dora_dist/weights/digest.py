"""Which base an adapter is of: not by its name alone, which says little once a folder was moved or replaced."""

import hashlib
import re
from pathlib import Path

from dora_dist.runtime.console import warn
from dora_dist.weights.safetensors_io import TensorFolder


def sampled_digest(tensors: TensorFolder, piece: int = 512) -> str:
    """A short text of names, types and shapes of all tensors and of bytes at the start, the middle and the end of each.

    It does not depend on how tensors are spread over files. To read them whole would take minutes.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(tensors.entries.items()):
        digest.update(f"{name} {entry.dtype} {tuple(entry.shape)}\n".encode())
        size = entry.nbytes
        with entry.path.open("rb") as file:
            for start in (0, max(0, size // 2 - piece // 2), max(0, size - piece)):
                file.seek(entry.offset + start)
                digest.update(file.read(min(piece, size - start)))
    return digest.hexdigest()[:12]


def warn_of_another_base(adapter: Path, name: str, digest: str, base: Path, base_digest: str) -> None:
    """Warn where an adapter, by the `name` and the `digest` of its base ("": not known), was trained on another one."""
    if digest and digest != base_digest:
        trained_on = f"on {name}, " if name else ""
        warn(
            f"{adapter} was trained {trained_on}on other weights than those in {base} (another model, or the same in "
            "another number format): its numbers are made for its own base"
        )
    elif name and not digest and _model(name) != _model(str(base)):
        warn(f"{adapter} was trained on {name}, and the base here is {base}: make sure that they are the same model")


def _model(name: str) -> str:
    """The last part of a hub name, or of a folder's, also where it is a snapshot in the hub's cache."""
    cached = re.search(r"models--.+?--([^/]+)/snapshots/", f"{name}/")
    return (cached[1] if cached else Path(name).resolve().name).casefold()
