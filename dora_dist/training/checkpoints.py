"""The checkpoints of a run while it trains: when one is due, its manifest, what became of it, and going on from one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerState

from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.early_stopping import COUNTS_AFTER
from dora_dist.checkpoint.saving import Saver
from dora_dist.config import CheckpointConfig
from dora_dist.runtime.console import warn
from dora_dist.runtime.distributed import World
from dora_dist.runtime.errors import UserError
from dora_dist.training.pruning import Pruning
from dora_dist.training.unreadable import COUNTS


class Checkpoints:
    """Writes the checkpoints of one run. Methods are collective, but for `wait` and `any_ended`."""

    def __init__(
        self,
        saver: Saver,
        options: CheckpointConfig,
        world: World,
        *,
        trained_with: Mapping[str, Any],
        metric: str,
    ) -> None:
        """`trained_with` is what the manifest records of the run (`resuming.record`), `metric` which one is the best
        by (training.metric).
        """
        self.keeps_best = options.keep_best
        self._saver, self._options, self._world = saver, options, world
        self._run_dir, self._trained_with, self._metric = Path(options.run_dir), trained_with, metric

    def save(
        self,
        state: TrainerState,
        learning_rates: Sequence[Any],
        pruning: Pruning,
        *,
        left_out: Mapping[str, int],
        counts_after: int = 0,
    ) -> None:
        """Start to write the checkpoint of the step that `state` is at; training goes on meanwhile.

        left_out: `Unreadable.counts`. counts_after: the step after which evaluations count for early stopping.
        """
        folder = run_folder.checkpoint_folder(self._run_dir, state.global_step)
        best = None
        if self.keeps_best and state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(folder)
            best = state.best_metric
        fields = {
            "step": state.global_step,
            "run": run_folder.run_of(self._run_dir) if self._world.first else None,
            "trained_with": self._trained_with,
            "learning_rates": learning_rates,
            COUNTS: left_out,
            COUNTS_AFTER: counts_after,
            **pruning.manifest_fields(),
        }

        def once_complete() -> None:
            if best is not None:
                run_folder.set_best(self._run_dir, folder, float(best), metric=f"eval_{self._metric}")
            run_folder.retire(self._run_dir, self._options.keep_last)

        self._saver.save(folder, fields, _plain(asdict(state)), survivors=pruning.survivors(), afterwards=once_complete)

    @property
    def any_ended(self) -> bool:
        """Whether this rank knows of a save that has ended, and that `ended` has not told of."""
        return self._saver.any_ended

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the save that is under way has ended; also where ranks end too early to agree on anything."""
        self._saver.wait(timeout_s)

    def ended(self, *, finishing: bool = False, steps_left: bool = True) -> dict[str, float]:
        """What to log of the first save that this has not told of yet, which is waited for; {} if there is none.

        Raises UserError if it failed, unless the run goes on without it (checkpoint.on_failure). When the run is
        `finishing`, and every save has ended, the last one holds the result, without which it does not end well.
        """
        saved = self._saver.ended()
        if saved is None:
            return {}
        if saved.failure is None:
            step = float(run_folder.step_of(saved.folder))
            return {"saved_step": step, "save_stall_seconds": saved.stall_s, "save_seconds": saved.write_s}
        text = f"saving {saved.folder} failed: {saved.failure}. Earlier checkpoints are as they were"
        stops = self._options.on_failure == "stop"
        if stops or (finishing and not self._saver.any_ended):
            hint = '. checkpoint.on_failure = "continue" would let training go on' if stops and steps_left else ""
            raise UserError(f"{text}{hint}")
        if self._world.first:
            warn(f"{text}; training goes on (checkpoint.on_failure)")
        return {"save_failed": 1.0}

    def close(self) -> None:
        """Wait for the last save, and let go of the saver's process group."""
        self._saver.close()


def _plain(value: Any) -> Any:
    """A JSON-able copy: what is not plain data (functions of a schedule, callbacks' objects) is left out."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if _is_plain(v)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value if _is_plain(v)]
    return value


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return isinstance(value, dict | list | tuple)
    return True
