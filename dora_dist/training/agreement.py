"""What all ranks of a run must agree on, beyond their code: configuration, base model, data, checkpoint."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from dora_dist.checkpoint.manifest import MANIFEST
from dora_dist.config import RunConfig
from dora_dist.config.fields import values
from dora_dist.data import RaggedDataset, TokenizedData
from dora_dist.runtime import plugins
from dora_dist.runtime.agreement import check_agreement, digest
from dora_dist.runtime.distributed import World
from dora_dist.runtime.hub import WANTED

OWN_TO_A_NODE = {
    "model.path",
    "model.tokenizer",
    "data.train",
    "data.validation",
    "data.cache",
    "data.features",
    "data.image_folder",
    "adapter.init_from",
}
"""Fields that say where something is on this node: its content has to be the same on all nodes, not its path."""


_SHARED_FOLDER = (
    "All ranks read one checkpoint, so its folder has to be shared by all nodes (NFS, Lustre or the like); put "
    "checkpoint.run_dir on such a file system, or copy the checkpoint that you mean to every node"
)


def check_checkpoint(world: World, folder: Path) -> None:
    """Raise UserError on every rank unless `folder` is the same checkpoint on all of them (collective).

    Where the run folder is local to each node, rank 0 would verify one checkpoint and the others read another.
    """
    manifest = folder / MANIFEST  # holds the checksums of all other files
    try:
        found = digest(manifest.read_bytes())
    except OSError as error:
        found = f"unreadable ({error.strerror})"
    check_agreement(world, {f"checkpoint.resume: {manifest}": found}, _SHARED_FOLDER)


def of_configuration(config: RunConfig) -> dict[str, str]:
    """Every field by its dotted name, but for those in `OWN_TO_A_NODE` and the logging section."""
    return {
        name: json.dumps(value)
        for name, value in values(json.loads(config.to_json()), type(config)).items()
        if name not in OWN_TO_A_NODE and not name.startswith("logging.")
    }


def of_plugins(names: Sequence[str]) -> dict[str, str]:
    """The code of the modules that the run loads: as much a part of it as this package's."""
    files = plugins.files(names)
    return {f"plugins: {name}": digest(b"".join(path.read_bytes() for path in found)) for name, found in files.items()}


def of_model_folder(
    field: str, folder: Path, whole: bool = False, *, patterns: Sequence[str] = WANTED
) -> dict[str, str]:
    """A text for each file in a model or adapter folder; of weights, size and header only, unless `whole`."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {f"{field}: {path.name}": _of_file(path, whole) for path in files}


def of_data(data: TokenizedData) -> dict[str, str]:
    """The samples as tokenized: number and content of each set, by all its columns."""
    sets: dict[str, RaggedDataset | None] = {"training data": data.train, "validation data": data.validation}
    return {name: rows.identity() for name, rows in sets.items() if rows is not None}


def _of_file(path: Path, whole: bool) -> str:
    size = path.stat().st_size
    if path.suffix == ".safetensors" and not whole:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            content = prefix + file.read(min(length, size))
    else:
        content = path.read_bytes()
    return f"{size:,} bytes, {digest(content)}"
