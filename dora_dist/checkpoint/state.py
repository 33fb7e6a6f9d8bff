"""Where the masters and moments of a checkpoint lie: in one file, or, where they are large, in a file of each rank.

Either way they are read as whole tensors, of which any flat range can be asked for: a reader does not know how many
ranks wrote them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dora_dist.checkpoint.manifest import read_manifest
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.on_demand import OnDemand
from dora_dist.weights.pieces import PiecedFolder
from dora_dist.weights.safetensors_io import TensorEntry, TensorFolder, read_header
from dora_dist.zero3.state_names import MASTER, MOMENTS

KEYS = (MASTER, *MOMENTS)
STATE = "state.safetensors"
_OF_A_RANK = re.compile(r"state-(\d{5})-of-(\d{5})\.safetensors")


def state_file(rank: int, world_size: int) -> str:
    """The name of a rank's own file. Their order is that of the ranks, which is that of the pieces."""
    return f"state-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def open_state(checkpoint: Path) -> TensorFolder:
    """The state of a complete checkpoint: for every trained parameter NAME the fp32 tensors `NAME.master`,
    `NAME.exp_avg` and `NAME.exp_avg_sq`, in its shape.

    Raises UserError where files are missing, or are not what the manifest says.
    """
    manifest = read_manifest(checkpoint, verify=False)
    return open_files(checkpoint, manifest["files"], shapes=manifest["model"]["trainable"])


def open_files(folder: Path, names: Iterable[str], *, shapes: Mapping[str, Sequence[int]]) -> TensorFolder:
    """As `open_state`, of parameters with these whole `shapes`, in those of the files `names` that are a state's; no
    listing of the folder is asked for, which a file server may have from before.
    """
    return as_one(folder, read_headers(folder, names), shapes)


Headers = Mapping[str, Mapping[str, TensorEntry]]
"""The tensors of each file of a state, by the file's name and then theirs."""


def read_headers(folder: Path, names: Iterable[str]) -> Headers:
    """The headers of the state's files among `names`, in their order. Raises UserError where there are not all."""
    found = sorted(name for name in names if name == STATE or _OF_A_RANK.fullmatch(name))
    of_a_rank = _OF_A_RANK.fullmatch(found[0]) if found else None
    count = int(of_a_rank[2]) if of_a_rank else 1
    expected = [state_file(rank, count) for rank in range(count)] if of_a_rank else [STATE]
    if found != expected:
        raise UserError(f"{folder}: holds {len(found)} of {count} state files; use another checkpoint")
    return {name: read_header(folder / name) for name in found}


def as_one(folder: Path, headers: Headers, shapes: Mapping[str, Sequence[int]]) -> TensorFolder:
    """What `open_files` gives, of headers that were read already: perhaps by a rank that has `folder` elsewhere."""
    here = [{n: replace(e, path=folder / file) for n, e in header.items()} for file, header in headers.items()]
    if STATE in headers:
        return TensorFolder(folder, here[0])
    return PiecedFolder.of_headers(folder, here, {f"{n}.{key}": tuple(s) for n, s in shapes.items() for key in KEYS})


class Masters(OnDemand[Tensor]):
    """The fp32 masters in a state by parameter name."""

    def __init__(self, state: TensorFolder) -> None:
        self.state = state
        names = [name.removesuffix(f".{MASTER}") for name in state.entries if name.endswith(f".{MASTER}")]
        super().__init__(dict.fromkeys(names), lambda name: state.read(self.stored(name)))

    def stored(self, name: str) -> str:
        """What the state calls a parameter's master."""
        return f"{name}.{MASTER}"
