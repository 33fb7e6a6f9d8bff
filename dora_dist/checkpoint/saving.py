"""Saving what trains, while it goes on training.

Training stands still only while each rank takes its state (`state_writers.py`): a small one is copied to host memory,
a large one goes into the rank's own file. A thread of every rank does the rest, over a process group of its own; rank
0's adds what there is once, and the manifest last.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from dora_dist.adapters.adapter_folder import SavedAdapter
from dora_dist.adapters.layer import AdaptedLinear, adapted_layers
from dora_dist.adapters.method import AdapterMethod
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.adapter_of_model import Origin, how_held, saved_adapter
from dora_dist.checkpoint.format import Survivors, adapter_ranks, identity
from dora_dist.checkpoint.manifest import write_manifest
from dora_dist.checkpoint.model_card import About, add_card, progress
from dora_dist.checkpoint.state import Masters, open_files
from dora_dist.checkpoint.state_writers import state_writer
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import new_folder
from dora_dist.weights.safetensors_io import TensorFolder
from dora_dist.zero3.optimizer_state import optimizer_step_count


@dataclass(frozen=True)
class Saved:
    """A save that has ended: training stood still for `stall_s`, writing took `write_s`; why it failed, if it did."""

    folder: Path
    stall_s: float
    write_s: float
    failure: str | None


class Saver:
    """Writes checkpoint folders of one engine's model, one at a time; every method is collective.

    Checkpoints are to be in `run_dir`, which is tried now where every rank has to write there (`state_writers.py`):
    UserError, on every rank. `timeout_s` bounds how long ranks wait for one another's disks.
    """

    def __init__(self, engine: Any, model: nn.Module, origin: Origin, *, run_dir: Path, timeout_s: float) -> None:
        self._engine, self._model, self._origin = engine, model, origin
        # Always gloo: the copies are in host memory, and the device's own group belongs to training.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s), group_desc="saving")
        self._held = how_held(model)  # now: the thread that saves may not walk a model whose parameters come and go
        self._state = state_writer(model, self._group, run_dir)
        self._thread: threading.Thread | None = None
        self._ended: deque[Saved] = deque()

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
        manifest = {
            **fields,
            "optimizer_steps": optimizer_step_count(self._engine),
            "model": identity(self._model, survivors),
            "base": {name: getattr(self._origin, name) for name in ("base_model", "revision", "base_digest")},
            "adapter": self._origin.method.settings(),
            "adapter_ranks": adapter_ranks(self._model, survivors),
            "trained_modules": list(self._origin.trained_modules),
            "task_type": self._origin.head.peft_type,
            "model_config": self._origin.head.kept_config(self._model),
        }
        try:
            with ExitStack() as opened:
                partial = self._open(folder, opened)
                self._state.take(partial, survivors)
                unfinished = opened.pop_all()
        except UserError as error:  # on every rank
            self._ended.append(Saved(folder, time.perf_counter() - started, 0.0, str(error)))
            return
        stall = time.perf_counter() - started

        def write() -> None:
            with unfinished:  # the folder appears when this is left, and not if an error does it
                known = self._state.write(partial)
                if dist.get_rank() == 0:
                    state = open_files(partial, known, shapes=manifest["model"]["trainable"])
                    self._write_result(partial, state, trainer_state)
                    (partial / run_folder.TRAINER_STATE).write_text(json.dumps(trainer_state, indent=2))
                    write_manifest(partial, manifest, form=self._state.format, known=known)
            if dist.get_rank() == 0:
                afterwards()

        self._thread = threading.Thread(target=self._run, args=(folder, write, stall), name="saver", daemon=True)
        self._thread.start()

    @property
    def any_ended(self) -> bool:
        """Whether a save has ended that `ended` has not given yet; not collective. Ranks learn it at about the same
        time, not at the same step."""
        return bool(self._ended)

    def ended(self) -> Saved | None:
        """The first save that this has not given yet, when it has ended; None if there is none."""
        if not self._ended:
            self.wait()
        return self._ended.popleft() if self._ended else None

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the save that is going on has ended, well or badly, or the time is over."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def close(self) -> None:
        """Wait, and let go of the process group."""
        self.wait()
        dist.destroy_process_group(self._group)

    def _open(self, folder: Path, opened: ExitStack) -> Path:
        """The folder to fill, which rank 0 makes: it takes its name when `opened` is left. UserError on every rank.

        Ranks agree on its name alone: the file system may be mounted elsewhere on another node.
        """
        found = [("", "")]
        if dist.get_rank() == 0:
            try:
                found = [(opened.enter_context(new_folder(folder, overwrite=True)).name, "")]
            except UserError as error:
                found = [("", str(error))]
        dist.broadcast_object_list(found, src=0, group=self._group)
        name, failure = found[0]
        if failure:
            raise UserError(failure)
        return folder.resolve().with_name(name)

    def _write_result(self, partial: Path, state: TensorFolder, trainer_state: Mapping[str, Any]) -> None:
        """The adapter's folder, if the method has one, with the tokenizer and a model card; else the tokenizer."""
        place, method = partial / run_folder.TOKENIZER, self._origin.method
        if isinstance(method, AdapterMethod):
            place = partial / run_folder.ADAPTER
            self._adapter(method, Masters(state)).write(place)
        if self._origin.files:
            place.mkdir(exist_ok=True)
        for name, content in self._origin.files.items():
            (place / name).write_bytes(content)
        if isinstance(method, AdapterMethod):
            add_card(place, self._about(method, trainer_state))

    def _about(self, method: AdapterMethod, trainer_state: Mapping[str, Any]) -> About:
        origin = self._origin
        return About(
            base=origin.base_model,
            revision=origin.revision,
            storage=self._held["base_storage"],
            method=method.title,
            task_type=origin.head.peft_type,
            run=origin.run,
            **progress(trainer_state),
        )

    def _adapter(self, method: AdapterMethod, masters: Masters) -> SavedAdapter:
        own = {name: _own(name, layer, masters) for name, layer in adapted_layers(self._model).items()}
        adapters = {f"{name}.{kind}" for name, values in own.items() for kind in values}
        stored = {name: (masters.state, masters.stored(name)) for name in masters if name not in adapters}
        return saved_adapter(self._model, method, self._origin, own=own, stored=stored, held=self._held)

    def _run(self, folder: Path, write: Callable[[], None], stall: float) -> None:
        started, failure = time.perf_counter(), None
        try:
            try:
                write()
            except Exception as error:  # told to every rank below
                failure = str(error)
            outcome = [failure]
            dist.broadcast_object_list(outcome, src=0, group=self._group)
            failure = outcome[0]
        except Exception as error:  # a lost rank: training will notice as well, and say which
            failure = f"the ranks lost each other: {error}"
        self._ended.append(Saved(folder, stall, time.perf_counter() - started, failure))


def _own(name: str, layer: AdaptedLinear, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's parameters, as far as they are left."""
    # This is a thread, so it asks the method for names and not the layer for its parameters: during a forward pass
    # DeepSpeed's lookup of a parameter that is away gathers it, which is collective.
    kinds = [kind for kind in layer.method.parameters(layer.shape) if f"{name}.{kind}" in masters]
    return {kind: masters[f"{name}.{kind}"] for kind in kinds}
