"""Whether all ranks run the same code on the same configuration, base model and data.

A node with an old checkout or half a copy of the model would train something else, or stop in the middle of a
collective. What must agree is turned into short texts by name, `{"adapter.r": "16"}`; `check_agreement` compares them.
"""

import hashlib
import json
import platform
import struct
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dora_dist import run_folder
from dora_dist.config import RunConfig
from dora_dist.data import HasColumns, fingerprint
from dora_dist.distributed import World
from dora_dist.errors import UserError
from dora_dist.hub import WANTED

PACKAGES = ("deepspeed", "transformers", "dora_dist")
OWN_TO_A_NODE = {
    "model.path",
    "model.tokenizer",
    "data.train",
    "data.validation",
    "data.cache",
    "data.image_folder",
    "adapter.init_from",
}
"""Fields that name where something is on this node; what is there has to agree, not the path."""

_MOST_SHOWN = 8
_SAME_EVERYWHERE = "Every node needs the same code, configuration, base model and data; bring the odd one up to date"
_SHARED_FOLDER = (
    "All ranks read one checkpoint, so its folder has to be shared by all nodes (NFS, Lustre or the like); put "
    "checkpoint.run_dir on such a file system, or copy the checkpoint that you mean to every node"
)


def check_agreement(world: World, facts: Mapping[str, str], remedy: str = _SAME_EVERYWHERE) -> None:
    """Compare `facts` of all ranks (collective). Raises UserError, on every rank, with field, values, ranks, hosts."""
    if world.world_size == 1:
        return
    everyone: list[tuple[str, dict[str, str]]] = [("", {})] * world.world_size
    dist.all_gather_object(everyone, (world.host, dict(facts)))
    if found := differences(everyone):
        raise UserError(f"the ranks disagree. {remedy}:\n  " + "\n  ".join(found))


def check_checkpoint(world: World, folder: Path) -> None:
    """Whether `folder` is the same checkpoint on every rank (collective). Raises UserError, on every rank, if not.

    Where the run folder is local to each node, rank 0 would verify one checkpoint and the others read another.
    """
    manifest = folder / run_folder.MANIFEST  # holds the checksums of all other files
    try:
        found = _digest(manifest.read_bytes())
    except OSError as error:
        found = f"unreadable ({error.strerror})"
    check_agreement(world, {f"checkpoint.resume: {manifest}": found}, _SHARED_FOLDER)


def differences(everyone: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Where the facts of ranks differ, a line per field, from (host, facts) of each rank."""
    hosts = [host for host, _ in everyone]
    lines = []
    for field in dict.fromkeys(name for _, facts in everyone for name in facts):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, (_, facts) in enumerate(everyone):
            ranks_by_value.setdefault(facts.get(field, "missing"), []).append(rank)
        if len(ranks_by_value) > 1:
            values = (f"{value} on {where(ranks, hosts)}" for value, ranks in ranks_by_value.items())
            lines.append(f"{field}: {'; '.join(values)}")
    more = [f"and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    return lines[:_MOST_SHOWN] + more


def where(ranks: Iterable[int], hosts: Sequence[str]) -> str:
    """Ranks with their hosts, for people: `ranks 0-3 (n0), 5 (n1)`."""
    ranks = list(ranks)
    parts = []
    for host, group in groupby(ranks, key=lambda rank: hosts[rank]):
        there = list(group)
        runs = [list(run) for _, run in groupby(enumerate(there), key=lambda pair: pair[1] - pair[0])]
        spans = [str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs]
        parts.append(f"{', '.join(spans)} ({host})")
    shown = ", ".join(parts[:_MOST_SHOWN]) + (" and others" if len(parts) > _MOST_SHOWN else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def of_code() -> dict[str, str]:
    """Versions, and every Python file of this package."""
    root = Path(__file__).parent
    return versions() | {
        f"{root.name}/{path.relative_to(root).as_posix()}": _digest(path.read_bytes())
        for path in sorted(root.rglob("*.py"))
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that a run's numbers come from."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {package: package_version(package) for package in PACKAGES}


def package_version(package: str) -> str:
    """The version of an installed package, or words where it is none (a checkout on the path)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def of_configuration(config: RunConfig) -> dict[str, str]:
    """Every field but those in `OWN_TO_A_NODE` and what a rank logs."""
    sections = json.loads(config.to_json())
    return {
        name: json.dumps(value)
        for section, fields in sections.items()
        for key, value in fields.items()
        if (name := f"{section}.{key}") not in OWN_TO_A_NODE and section != "logging"
    }


def of_model_folder(
    field: str, folder: Path, whole: bool = False, *, patterns: Sequence[str] = WANTED
) -> dict[str, str]:
    """Every file of a model or adapter folder that counts; of weights, size and header only, unless `whole`."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {f"{field}: {path.name}": _of_file(path, whole) for path in files}


def of_data(data: Any) -> dict[str, str]:
    """The samples as tokenized (TokenizedData): number and content of each set, by all its columns."""
    sets: dict[str, HasColumns | None] = {"training data": data.train, "validation data": data.validation}
    return {
        name: f"{len(rows):,} samples, sha256 {fingerprint(rows.columns())}"
        for name, rows in sets.items()
        if rows is not None
    }


def _of_file(path: Path, whole: bool) -> str:
    size = path.stat().st_size
    if path.suffix == ".safetensors" and not whole:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            content = prefix + file.read(min(length, size))
    else:
        content = path.read_bytes()
    return f"{size:,} bytes, {_digest(content)}"


def _digest(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"
