"""What merging and exporting an adapter share: its base, where the result may be, weights in blocks of rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dora_dist.adapters.adapter_folder import AdapterFolder
from dora_dist.adapters.folders import CONFIG_NAMES
from dora_dist.adapters.storage import PLAIN, WeightStorage, as_held
from dora_dist.checkpoint.adapter_folders import base_path
from dora_dist.checkpoint.manifest import MANIFEST, NAME
from dora_dist.checkpoint.merge_plan import Output
from dora_dist.models.folder import ModelFolder
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import check_output
from dora_dist.weights.digest import sampled_digest, warn_of_another_base
from dora_dist.weights.safetensors_io import TensorFolder

BLOCK_BYTES = 16 << 20


def open_base(adapter: AdapterFolder, name: str) -> ModelFolder:
    """The base `name`, a folder or hub name; in the adapter's own revision where it is the base that the adapter names.

    Raises UserError where it cannot be found, or is not a model.
    """
    own = name == adapter.base_model
    return ModelFolder.open(base_path(name, adapter.revision if own else None, str(adapter.path)))


def warn_of_another(adapter: AdapterFolder, base: TensorFolder) -> None:
    """Warn where the adapter was trained on another base."""
    warn_of_another_base(adapter.path, adapter.base_model, adapter.base_digest(), base.path, sampled_digest(base))


def base_for_peft(adapter: AdapterFolder, name: str, output: Path) -> ModelFolder:
    """The base `name` of an adapter that is to be written as the PEFT folder `output`; warns as `warn_of_another` does.

    Raises UserError as `open_base` and `check_place` do.
    """
    base = open_base(adapter, name)
    check_place(output, base.path, adapter.path, what="an adapter", marks=CONFIG_NAMES)
    warn_of_another(adapter, base.tensors)
    return base


def check_place(output: Path, base: Path, adapter: Path, *, what: str, marks: Sequence[str]) -> None:
    """Raise UserError where the folder `output` would replace an input or lie in one, lie in any checkpoint, replace a
    folder that is not `what` (by `marks`, see `check_output`), or be taken for a checkpoint of a run.
    """
    output = Path(output).resolve()
    if NAME.fullmatch(output.name):
        raise UserError(f"{output}: is named as a run's checkpoints are, and would be taken for one; give another name")
    check_output(output, {"base": base, "adapter": adapter}, what=what, marks=marks)
    for place in output.parents:
        if (place / MANIFEST).is_file():
            raise UserError(
                f"{output}: lies in the checkpoint {place}, which must stay as it is; choose another folder"
            )


def check_space(output: Path, nbytes: int) -> None:
    """Raise UserError where the disk of the new file or folder `output` is too small for `nbytes`."""
    place = next(folder for folder in output.parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        needed = f"{nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise UserError(f"{output}: disk full: {needed}; free some space or choose another place")


def trained_on(output: Output, storage: WeightStorage) -> WeightStorage | None:
    """What held a weight that is adapted or `packed`, in a run with this `storage`; None for any other tensor."""
    if output.packed:
        return storage
    return PLAIN if output.module else None


def row_blocks(output: Output, storage: WeightStorage | None = None) -> Iterator[tuple[int, Tensor]]:
    """A tensor in blocks of rows, each with the number of its first row: memory is that of BLOCK_BYTES in fp32.

    Blocks are flat and have the output's dtype; with a `storage`, of a weight (out, in), they are (rows, in), fp32, and
    the weight as that holds it.
    """
    entry, source = output.entry, output.source
    rows = entry.shape[0] if entry.shape else 1
    width = entry.numel // rows if rows else 0
    step = max(1, BLOCK_BYTES // (4 * max(width, 1)))
    for start in range(0, rows, step):
        span = (start * width, min(start + step, rows) * width)
        if storage is None:
            yield start, source.read_flat(entry.name, *span, dtype=output.dtype)
        else:
            read = partial(source.read_flat, entry.name, dtype=torch.float32)
            yield start, as_held(storage, read, entry.numel, span=span).view(-1, width)
