"""How the state of what trains gets into a checkpoint's folder: a small one through rank 0, a large one from each rank.

Both write what `state.open_files` reads. Adapters go through host memory to rank 0, which writes one file while
training goes on. That would take a copy of everything for whole models, and 84 GB through one rank for 7 billion
numbers. There, and where one tensor alone is large, every rank writes its own elements into its own file, in small
pieces and without any copy, and training stands still while the system's cache takes them. What does not need the state
any more (reaching the disk, checksums, the manifest) follows while training goes on.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dora_dist.checkpoint.format import PIECE, Survivors, component_owners, stored_shapes, trainable
from dora_dist.checkpoint.manifest import FORMAT, FORMAT_OF_SHARDS, file_entry
from dora_dist.checkpoint.state import KEYS, STATE, state_file
from dora_dist.runtime.distributed import together
from dora_dist.runtime.errors import UserError
from dora_dist.weights.safetensors_io import TensorWriter
from dora_dist.zero3.optimizer_state import held_state, read_state
from dora_dist.zero3.partition import full_numel, full_shape, local_range, shard_length

SHARDED_FROM_BYTES = 4 << 30
"""States of at least so many bytes (12 for each trained number) are written by every rank: 358 million numbers."""
LARGEST_GATHERED = 1 << 26
"""Elements of the largest tensor that rank 0 gathers, whole and in fp32: 268 MB."""

FileEntries = Mapping[str, Mapping[str, Any]]
"""What the manifest is to say of files, by name, as those who wrote them know it."""


class StateWriter(Protocol):
    """Writes the state of one engine's model, one checkpoint after the other. All methods are collective."""

    format: int

    def take(self, folder: Path, survivors: Survivors) -> None:
        """While training stands still: after this the parameters may change. Raises UserError, on every rank."""

    def write(self, folder: Path) -> FileEntries:
        """In a thread, while training goes on: the rest. Afterwards rank 0 can read the state in `folder`, and is told
        of each of its files.

        Raises UserError where the folder cannot be written: on rank 0, or on every rank.
        """


def state_writer(model: nn.Module, group: Any, run_dir: Path) -> StateWriter:
    """What fits the model's size; `group` is a gloo group for nothing else, `run_dir` where checkpoints are to be.

    Raises UserError, on every rank, where all ranks are to write and do not see the same folder there.
    """
    if _is_large([full_numel(p) for _, p in trainable(model)]):
        return ShardFiles(model, group, run_dir)
    return GatheredFile(model, group)


def _is_large(elements: Sequence[int]) -> bool:
    """Whether rank 0 is spared a state; `elements` of each trained parameter."""
    size = sum(elements) * len(KEYS) * torch.float32.itemsize
    return size >= SHARDED_FROM_BYTES or max(elements, default=0) > LARGEST_GATHERED


class GatheredFile:
    """Copies in host memory, sent to rank 0 tensor by tensor, which writes state.safetensors."""

    format = FORMAT

    def __init__(self, model: nn.Module, group: Any) -> None:
        self._model, self._group = model, group
        self._trainable = trainable(model)
        self._lengths = [shard_length(p) for _, p in self._trainable]
        # Made and touched now, and kept: fresh memory costs more than copying into it.
        copies = torch.empty(len(KEYS) * sum(self._lengths), dtype=torch.float32).zero_()
        self._copies: Tensor = get_accelerator().pin_memory(copies)
        self._survivors: Survivors = {}

    def take(self, folder: Path, survivors: Survivors) -> None:
        self._survivors = survivors
        for (parameter, key), copy in zip(self._tensors(), self._pieces(), strict=True):
            local = read_state(parameter, key)
            copy[: local.numel()].copy_(local, non_blocking=True)
        get_accelerator().synchronize()

    def write(self, folder: Path) -> FileEntries:
        state = self._gathered()
        try:
            if dist.get_rank() == 0:
                self._write_file(folder / STATE, state)
        finally:
            for _ in state:  # the other ranks, and rank 0 after a failure, take part in the remaining gathers
                pass
        return {STATE: file_entry(folder / STATE)} if dist.get_rank() == 0 else {}

    def _tensors(self) -> Iterator[tuple[nn.Parameter, str]]:
        return ((parameter, key) for _, parameter in self._trainable for key in KEYS)

    def _pieces(self) -> tuple[Tensor, ...]:
        """Of each tensor this rank's elements, padded to the same length on every rank: views of the copies."""
        return self._copies.split([length for length in self._lengths for _ in KEYS])

    def _gathered(self) -> Iterator[tuple[str, str, Tensor]]:
        """Each tensor's parameter name and key, and the whole of it on rank 0; a collective each."""
        names = [(name, key) for name, _ in self._trainable for key in KEYS]
        for (name, key), (parameter, _), piece in zip(names, self._tensors(), self._pieces(), strict=True):
            whole = torch.empty(len(piece) * dist.get_world_size() if dist.get_rank() == 0 else 0)
            parts = list(whole.split(len(piece))) if dist.get_rank() == 0 else None
            dist.gather(piece, parts, dst=0, group=self._group)
            if parts is not None:
                whole = whole[: full_numel(parameter)].view(full_shape(parameter))
            yield name, key, whole

    def _write_file(self, path: Path, state: Iterator[tuple[str, str, Tensor]]) -> None:
        shapes, owners = stored_shapes(self._model, self._survivors), component_owners(self._model)
        layout = [(f"{name}.{key}", torch.float32, shape) for name, shape in shapes.items() for key in KEYS]
        with TensorWriter(path, layout, metadata={"format": "pt"}) as writer:
            for name, key, whole in state:
                if name not in shapes:
                    continue
                kept = self._survivors.get(owners.get(name, ""))
                if kept is not None:
                    whole = whole[..., kept.cpu()].contiguous()
                writer.write(f"{name}.{key}", whole)


class ShardFiles:
    """A file of each rank, of flat pieces: what it holds of each tensor."""

    format = FORMAT_OF_SHARDS

    def __init__(self, model: nn.Module, group: Any, run_dir: Path) -> None:
        _check_shared(run_dir)
        self._model, self._group = model, group
        self._name = state_file(dist.get_rank(), dist.get_world_size())
        self._unfinished = ExitStack()
        # Copies from a device into pageable memory are several times slower.
        self._piece: Tensor = get_accelerator().pin_memory(torch.empty(PIECE, dtype=torch.float32))

    def take(self, folder: Path, survivors: Survivors) -> None:
        get_accelerator().synchronize()  # views of the state are read, past the engine's own streams
        failure = None
        try:
            with ExitStack() as stack:
                writer = stack.enter_context(self._opened(folder, survivors))
                for name, parameter, kept in self._held(survivors):
                    for key in KEYS:
                        self._append(writer, name, parameter, key=key, kept=kept)
                self._unfinished = stack.pop_all()
        except Exception as error:  # raised below, on every rank
            failure = str(error)
        # Also so that ranks go on at the same time: one with a slow disk must not look as if it hung in a step.
        self._all_or_none(failure)

    def write(self, folder: Path) -> FileEntries:
        failure, entry = None, {}
        try:
            self._unfinished.close()  # flushed to disk, and under its name
            entry = file_entry(folder / self._name)
        except Exception as error:  # raised below, on every rank
            failure = str(error)
        self._all_or_none(failure)
        entries: list[tuple[str, dict[str, Any]]] = [("", {})] * dist.get_world_size()
        dist.all_gather_object(entries, (self._name, entry), group=self._group)
        return dict(entries)

    def _opened(self, folder: Path, survivors: Survivors) -> TensorWriter:
        if not folder.is_dir():
            raise _not_shared(folder)
        layout = []
        for name, parameter, kept in self._held(survivors):
            start, stop = local_range(parameter)
            length = stop - start if kept is None else len(kept)
            layout += [(f"{name}.{key}", torch.float32, (length,)) for key in KEYS if length]
        return TensorWriter(folder / self._name, layout, metadata={"format": "pt"})

    def _held(self, survivors: Survivors) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
        """What is written: parameters, each with its elements here that survive (indices; None: all of them)."""
        shapes, owners = stored_shapes(self._model, survivors), component_owners(self._model)
        for name, parameter in trainable(self._model):
            left = survivors.get(owners.get(name, ""))
            if name in shapes and left is None:
                yield name, parameter, None
            elif name in shapes and left is not None:
                component = torch.arange(*local_range(parameter)) % full_shape(parameter)[-1]
                yield name, parameter, torch.isin(component, left.cpu()).nonzero().flatten()

    def _append(
        self, writer: TensorWriter, name: str, parameter: nn.Parameter, *, key: str, kept: Tensor | None
    ) -> None:
        start, stop = local_range(parameter)
        held = held_state(parameter, key)
        for first in range(0, stop - start, PIECE):
            count = min(PIECE, stop - start - first)
            piece = torch.zeros(count) if held is None else self._on_host(held[first : first + count])
            if kept is not None:
                here = kept[(kept >= first) & (kept < first + count)] - first
                piece = piece[here]
            if len(piece):
                writer.write(f"{name}.{key}", piece)

    def _on_host(self, held: Tensor) -> Tensor:
        """`held` where it is in host memory; else a copy, which the next call overwrites."""
        return held if held.device.type == "cpu" else self._piece[: len(held)].copy_(held)

    def _all_or_none(self, failure: str | None) -> None:
        """Raise UserError, on every rank, if one failed; what this rank has begun to write is then gone."""
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure, group=self._group)
        found = {rank: text for rank, text in enumerate(failures) if text is not None}
        if found:
            rank, text = min(found.items())
            error = UserError(f"rank {rank}: {text}" if len(failures) > 1 else text)
            self._unfinished.__exit__(UserError, error, None)
            dist.barrier(group=self._group)  # before rank 0 removes the folder, no rank has a file open in it
            raise error


def _check_shared(run_dir: Path) -> None:
    """Raise UserError, on every rank, where one does not see what rank 0 writes in the run folder (collective)."""
    name = [f".probe-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name)
    probe = run_dir / name[0]
    try:
        with together("writing into the run folder"):
            if dist.get_rank() == 0:
                run_dir.mkdir(parents=True, exist_ok=True)
                probe.touch()
        with together("looking into the run folder"):
            if not probe.is_file():
                raise _not_shared(probe)
    finally:
        if dist.get_rank() == 0:
            probe.unlink(missing_ok=True)


def _not_shared(missing: Path) -> UserError:
    return UserError(
        f"checkpoint.run_dir: {missing}, which rank 0 has made, is not there. Every rank writes its own part of a "
        "state this large, so the run folder has to be on a file system that all nodes share (NFS, Lustre or the like)"
    )
