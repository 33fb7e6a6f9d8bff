"""Where the masters and moments of a checkpoint lie: in one file, or, where they are large, in a file of each rank.

Either way they are read as whole tensors, of which any flat range can be asked for: a reader does not know how many
ranks wrote them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from dora_dist.checkpoint.manifest import read_manifest
from dora_dist.runtime.errors import UserError
from dora_dist.weights.pieces import PiecedFolder
from dora_dist.weights.safetensors_io import TensorFolder
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
    shapes: Mapping[str, Sequence[int]] = read_manifest(checkpoint, verify=False)["model"]["trainable"]
    return open_files(checkpoint, shapes)


def open_files(folder: Path, shapes: Mapping[str, Sequence[int]]) -> TensorFolder:
    """As `open_state`, of parameters with these whole `shapes`; the manifest need not be there yet."""
    if (folder / STATE).is_file():
        return TensorFolder.open(folder / STATE)
    files = sorted(path for path in folder.glob("state-*") if _OF_A_RANK.fullmatch(path.name))
    expected = int(_OF_A_RANK.fullmatch(files[0].name)[2]) if files else 1  # type: ignore[index]
    if [path.name for path in files] != [state_file(rank, expected) for rank in range(expected)]:
        raise UserError(f"{folder}: holds {len(files)} of {expected} state files; use another checkpoint")
    return PiecedFolder.of_files(folder, files, {f"{n}.{key}": tuple(s) for n, s in shapes.items() for key in KEYS})


class Masters(Mapping[str, Tensor]):
    """The fp32 masters in a state by parameter name; each is read when it is asked for, and not kept."""

    def __init__(self, state: TensorFolder) -> None:
        self.state = state
        self._names = [name.removesuffix(f".{MASTER}") for name in state.entries if name.endswith(f".{MASTER}")]

    def stored(self, name: str) -> str:
        """What the state calls a parameter's master."""
        return f"{name}.{MASTER}"

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self.state.read(self.stored(name))

    def __contains__(self, name: object) -> bool:
        return f"{name}.{MASTER}" in self.state.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
