"""Whether all ranks run the same code on the same configuration, base model and data.

A node with an old checkout or an incomplete copy of the model would train something else, or fail inside a collective.
What must agree is turned into short texts by name, `{"adapter.r": "16"}`; `check_agreement` compares them.
"""

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist

from dora_dist.runtime.distributed import World
from dora_dist.runtime.errors import UserError

PACKAGES = ("deepspeed", "transformers", "dora_dist")
_MOST_SHOWN = 8
_SAME_EVERYWHERE = "Every node needs the same code, configuration, base model and data; bring the odd one up to date"


def check_agreement(world: World, facts: Mapping[str, str], remedy: str = _SAME_EVERYWHERE) -> None:
    """Compare `facts` of all ranks (collective). Raises UserError, on every rank, with field, values, ranks, hosts."""
    if world.world_size == 1:
        return
    everyone: list[tuple[str, dict[str, str]]] = [("", {})] * world.world_size
    dist.all_gather_object(everyone, (world.host, dict(facts)))
    if found := differences(everyone):
        raise UserError(f"the ranks disagree. {remedy}:\n  " + "\n  ".join(found))


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
    root = Path(__file__).parents[1]
    return versions() | {
        f"{root.name}/{path.relative_to(root).as_posix()}": digest(path.read_bytes())
        for path in sorted(root.rglob("*.py"))
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that a run's numbers come from."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {package: package_version(package) for package in PACKAGES}


def package_version(package: str) -> str:
    """The version of an installed package; "(not installed)" for one that is only on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def digest(content: bytes) -> str:
    """A short text that two contents share only if they are the same."""
    return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"
