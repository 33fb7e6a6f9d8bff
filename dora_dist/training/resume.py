"""Which checkpoint a run goes on from, whether anything is left to do, and what has changed since it was written.

The ranks settle the first two before data and base are read, and the third before the model is built.
"""

import difflib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dora_dist.checkpoint import resuming, run_folder
from dora_dist.checkpoint.manifest import read_manifest
from dora_dist.config import RunConfig
from dora_dist.data.sampler import SAMPLES
from dora_dist.runtime.console import note, warn
from dora_dist.runtime.distributed import World, together
from dora_dist.runtime.errors import UserError
from dora_dist.training.agreement import check_checkpoint
from dora_dist.training.inputs import Inputs
from dora_dist.weights.safetensors_io import TensorFolder


def find_checkpoint(named: str | None, run_dir: Path, world: World) -> Path | None:
    """The checkpoint to go on from, intact to the last byte; `named` is checkpoint.resume (collective).

    Raises UserError, on every rank, if the named one is not there or damaged, or if a fresh run would mix its files
    with those of an earlier one.
    """
    found: list[Path | None] = [None]
    with together("looking for earlier checkpoints"):
        if not world.first:  # checksums read every byte: once is enough
            pass
        elif named == "auto":
            found = [run_folder.newest_intact(run_dir)]
            if found[0] is None:
                warn(f"checkpoint.resume = auto: {_nothing_in(run_dir)}, so the run starts from nothing")
        elif named is not None:
            found = [_named(Path(named), run_dir)]
        else:
            check_unused(run_dir)
    return read_by_all(found[0], world)


def read_by_all(checkpoint: Path | None, world: World) -> Path | None:
    """The checkpoint that rank 0 found (collective). Raises UserError, on every rank, if others have another there."""
    found = [checkpoint]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        check_checkpoint(world, found[0])
    return found[0]


def check_unused(run_dir: Path) -> None:
    """Raise UserError if the folder holds a run already."""
    if earlier := run_folder.newest_checkpoint(run_dir):
        raise UserError(
            f"checkpoint.run_dir: {run_dir} already holds a run ({earlier.name}); go on with it by "
            "--checkpoint.resume auto, or give another checkpoint.run_dir"
        )


def is_finished(config: RunConfig, resume: Path) -> bool:
    """Whether the run that goes on from `resume` has taken its last step already, which is then said (collective).

    Raises UserError, on every rank, for settings that may not change.
    """
    said = None
    with together(f"comparing the configuration with {resume}"):
        manifest = read_manifest(resume, verify=False)
        resuming.check_settings(resume, manifest, config)
        said = resuming.finished(resume, manifest, config)
    if said:
        note(said)
    return said is not None


def compare(
    config: RunConfig, inputs: Inputs, world: World, *, resume: Path | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What checkpoints record of this run (filled on rank 0), and what changed since `resume`; prints the changes.

    Collective. Raises UserError, on every rank, where base or training data differ.
    """
    trained_with: dict[str, Any] = {}
    changed: dict[str, str] = {}
    with together("comparing base and data with those of the checkpoint"):
        if world.first:
            train, base = inputs.data.train, inputs.base
            order = {SAMPLES: len(train), **train.order_facts}
            if list(train.parts) != [""]:
                order[resuming.PARTS] = train.parts
            tensors = TensorFolder.open(base)
            trained_with = resuming.record(
                config, world.world_size, data=inputs.contents, order=order, base=base, tensors=tensors
            )
            if resume is not None:
                manifest = read_manifest(resume, verify=False)
                changed = resuming.changes(resume, manifest, config, ours=trained_with)
    found = [changed]
    dist.broadcast_object_list(found)
    for line in resuming.told(found[0], streamed=config.data.streaming):
        assert resume is not None
        note(f"changed since {resume.name}: {line}")
    return trained_with, found[0]


def _named(path: Path, run_dir: Path) -> Path:
    """The checkpoint that checkpoint.resume names by its folder, or by a run folder, whose newest intact one it is."""
    checkpoint = path
    if run_folder.checkpoints(path):
        newest = run_folder.newest_intact(path)
        if newest is None:
            raise UserError(f'checkpoint.resume = "{path}": none of its checkpoints is intact')
        note(f"checkpoint.resume: {path} is a run folder; going on from its newest checkpoint, {newest.name}")
        checkpoint = newest
    else:
        run_folder.check_run(path, read_manifest(path))
    if checkpoint.resolve().parent != run_dir.resolve():
        check_unused(run_dir)
    return checkpoint


def _nothing_in(run_dir: Path) -> str:
    what = "holds no checkpoint" if run_dir.is_dir() else "does not exist"
    parent = run_dir.parent
    close: list[str] = []
    with suppress(OSError):  # a folder that may be entered and not listed
        names = [entry.name for entry in parent.iterdir() if entry.name != run_dir.name]
        near = difflib.get_close_matches(run_dir.name, names, 3)
        close = [name for name in near if run_folder.checkpoints(parent / name)]
    return f"{run_dir} {what}{f' (did you mean {parent / close[0]}?)' if close else ''}"
