"""Saving what trains, while it goes on training.

Training stands still only while each rank copies its own shards to host memory. A thread of every rank then sends
the copies to rank 0, tensor by tensor over a process group of its own, and rank 0's thread writes the folder.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dora_dist.adapters.adapter_folder import SavedAdapter
from dora_dist.adapters.besides import Besides
from dora_dist.adapters.layer import AdaptedLinear, adapted_layers
from dora_dist.adapters.method import AdapterMethod, Method
from dora_dist.adapters.native_format import NativeAdapter, NativeLayer
from dora_dist.adapters.peft_format import PeftAdapter
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.adapters.storage import PLAIN
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.format import (
    Survivors,
    adapter_ranks,
    component_owners,
    identity,
    stored_shapes,
    trainable,
)
from dora_dist.checkpoint.manifest import write_manifest
from dora_dist.checkpoint.state import KEYS, STATE
from dora_dist.models.heads import CAUSAL_LM, Head
from dora_dist.runtime.folders import new_folder
from dora_dist.weights.safetensors_io import TensorWriter
from dora_dist.zero3.optimizer_state import optimizer_step_count, read_state
from dora_dist.zero3.partition import full_numel, full_shape, shard_length
from dora_dist.zero3.state_names import MASTER


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a checkpoint says of where it comes from, and its adapter, if the method has one. `trained_modules`: PEFT's
    modules_to_save; `files`: what else belongs in the adapter's folder, by name (the tokenizer), for rank 0 alone.
    """

    method: Method
    base_model: str
    revision: str | None = None
    head: Head = CAUSAL_LM
    trained_modules: Sequence[str] = ()
    besides: Besides = field(default_factory=Besides)
    base_digest: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A save that has ended: training stood still for `stall_s`, writing took `write_s`; why it failed, if it did."""

    folder: Path
    stall_s: float
    write_s: float
    failure: str | None


class Saver:
    """Writes checkpoint folders of one engine's model, one at a time; every method is collective.

    `timeout_s` bounds how long the other ranks wait for rank 0's disk.
    """

    def __init__(self, engine: Any, model: nn.Module, origin: Origin, *, timeout_s: float) -> None:
        self._engine, self._model, self._origin = engine, model, origin
        # Always gloo: the copies are in host memory, and the device's own group belongs to training.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s), group_desc="saving")
        self._trainable = trainable(model)
        self._lengths = [shard_length(p) for _, p in self._trainable]
        # Made and touched now, and kept: fresh memory costs more than copying into it.
        copies = torch.empty(len(KEYS) * sum(self._lengths), dtype=torch.float32).zero_()
        self._copies: Tensor = get_accelerator().pin_memory(copies)
        self._thread: threading.Thread | None = None
        self._ended: Saved | None = None

    def save(
        self,
        folder: Path,
        fields: dict[str, Any],
        trainer_state: dict[str, Any],
        *,
        survivors: Survivors | None = None,
        afterwards: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the state and start writing `folder`, with the adapter's folder inside it.

        `fields` join the manifest (step, position in the data; plain JSON). With `survivors`, only those components
        of the gated layers they name are written, as of a model that never had the others. The folder appears under
        its name only when complete; then rank 0 calls `afterwards`. A save still going on is waited for.
        """
        started = time.perf_counter()
        self.wait()
        survivors = survivors or {}
        self._take_copies()
        manifest = {
            **fields,
            "optimizer_steps": optimizer_step_count(self._engine),
            "model": identity(self._model, survivors),
            "adapter": self._origin.method.settings(),
            "adapter_ranks": adapter_ranks(self._model, survivors),
            "trained_modules": list(self._origin.trained_modules),
            "task_type": self._origin.head.peft_type,
            "model_config": self._origin.head.kept_config(self._model),
        }
        stall = time.perf_counter() - started

        def write(state: Iterator[tuple[str, str, Tensor]]) -> None:
            with new_folder(folder, overwrite=True) as partial:
                masters = self._write_state(partial / STATE, state, survivors)
                if isinstance(self._origin.method, AdapterMethod):
                    self._adapter(self._origin.method, masters).write(partial / run_folder.ADAPTER)
                    for name, content in self._origin.files.items():
                        (partial / run_folder.ADAPTER / name).write_bytes(content)
                (partial / run_folder.TRAINER_STATE).write_text(json.dumps(trainer_state, indent=2))
                write_manifest(partial, manifest)
            afterwards()

        self._thread = threading.Thread(target=self._run, args=(folder, write, stall), name="saver", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last save has ended, and badly. Ranks learn it at about the same time, not at the same step."""
        return self._ended is not None and self._ended.failure is not None

    def ended(self) -> Saved | None:
        """The last save, once, if it has ended since this was asked."""
        ended, self._ended = self._ended, None
        return ended

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the save that is going on has ended, well or badly, or the time is over."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def close(self) -> None:
        """Wait, and let go of the process group."""
        self.wait()
        dist.destroy_process_group(self._group)

    # --- while training stands still -------------------------------------------------------------------------------

    def _take_copies(self) -> None:
        for (parameter, key), copy in zip(self._tensors(), self._pieces(), strict=True):
            local = read_state(parameter, key)
            copy[: local.numel()].copy_(local, non_blocking=True)
        get_accelerator().synchronize()

    def _tensors(self) -> Iterator[tuple[nn.Parameter, str]]:
        return ((parameter, key) for _, parameter in self._trainable for key in KEYS)

    def _pieces(self) -> tuple[Tensor, ...]:
        """Of each tensor this rank's elements, padded to the same length on every rank: views of the copies."""
        return self._copies.split([length for length in self._lengths for _ in KEYS])

    # --- in the thread ---------------------------------------------------------------------------------------------

    def _run(self, folder: Path, write: Callable[[Iterator[tuple[str, str, Tensor]]], None], stall: float) -> None:
        started, failure = time.perf_counter(), None
        state = self._gathered()
        try:
            if dist.get_rank() == 0:
                try:
                    write(state)
                except Exception as error:  # told to every rank below
                    failure = str(error)
            for _ in state:  # the other ranks, and rank 0 after a failure, take part in the remaining gathers
                pass
            outcome = [failure]
            dist.broadcast_object_list(outcome, src=0, group=self._group)
            failure = outcome[0]
        except Exception as error:  # a lost rank: training will notice as well, and say which
            failure = f"the ranks lost each other: {error}"
        self._ended = Saved(folder, stall, time.perf_counter() - started, failure)

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

    def _write_state(
        self, path: Path, state: Iterator[tuple[str, str, Tensor]], survivors: Survivors
    ) -> dict[str, Tensor]:
        """Stream the state to a safetensors file; returns the masters by parameter name."""
        shapes, owners = stored_shapes(self._model, survivors), component_owners(self._model)
        layout = [(f"{name}.{key}", torch.float32, shape) for name, shape in shapes.items() for key in KEYS]
        masters = {}
        with TensorWriter(path, layout, metadata={"format": "pt"}) as writer:
            for name, key, whole in state:
                if name not in shapes:
                    continue
                kept = survivors.get(owners.get(name, ""))
                if kept is not None:
                    whole = whole[..., kept.cpu()].contiguous()
                writer.write(f"{name}.{key}", whole)
                if key == MASTER:
                    masters[name] = whole
        return masters

    def _adapter(self, method: AdapterMethod, masters: dict[str, Tensor]) -> SavedAdapter:
        """What trained, in PEFT's format, or in our own where PEFT has none for the method."""
        origin, adapted = self._origin, adapted_layers(self._model)
        own = {name: _own(name, layer, masters) for name, layer in adapted.items()}
        adapters = {f"{name}.{kind}" for name, values in own.items() for kind in values}
        common: dict[str, Any] = {
            "base_model": origin.base_model,
            "revision": origin.revision,
            "task_type": origin.head.peft_type,
            "model_config": origin.head.kept_config(self._model),
            "modules_to_save": [*origin.trained_modules, *origin.besides.modules],
            "trained": {name: values for name, values in masters.items() if name not in adapters},
            "base_digest": origin.base_digest,
            "base_storage": next((layer.storage.name for layer in adapted.values()), PLAIN.name),
        }
        if not method.in_peft:
            native = {n: NativeLayer(layer.method, layer.shape, own[n]) for n, layer in adapted.items()}
            return NativeAdapter(layers=native, **common)
        layers = {name: _peft_layer(layer, own[name]) for name, layer in adapted.items()}
        return PeftAdapter(
            lora_alpha=method.lora_alpha,
            r=method.r or 1,
            dropout=method.dropout,
            use_dora=method.weight_decomposed,
            all_biases=origin.besides.all_biases,
            layers={name: layer for name, layer in layers.items() if layer is not None},
            **common,
        )


def _own(name: str, layer: AdaptedLinear, masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's parameters, as far as they are left."""
    # This is a thread, so it asks the method for names and not the layer for its parameters: during a forward pass
    # DeepSpeed's lookup of a parameter that is away gathers it, which is collective.
    kinds = [kind for kind in layer.method.parameters(layer.shape) if f"{name}.{kind}" in masters]
    return {kind: masters[f"{name}.{kind}"] for kind in kinds}


def _peft_layer(layer: AdaptedLinear, own: dict[str, Tensor]) -> AdapterLayer | None:
    """A layer as PEFT knows it; None if nothing of it is left."""
    return layer.method.to_peft(layer.shape, own, None if layer.base_norm is None else layer.base_norm.cpu())
