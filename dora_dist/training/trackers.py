"""Experiment trackers, by the callbacks that Hugging Face's Trainer has for them, on rank 0.

Each has a thread of its own, which alone calls it: a tracker that raises is left out with a warning, one that hangs
holds nothing up, and at the end of a run all are waited for once, for a short time.
"""

import copy
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import transformers.integrations as integrations

from dora_dist.checkpoint import run_folder
from dora_dist.config import RunConfig
from dora_dist.config.fields import values
from dora_dist.runtime.console import note, warn
from dora_dist.runtime.secrets import redacted, without_secrets

CLOSING_S = 15.0
"""How long the end of a run waits for all trackers together."""
MOST_WAITING = 10_000
"""Lines that a tracker which does not keep up may have waiting; later ones are dropped."""
_CALLBACKS = {
    "tensorboard": integrations.TensorBoardCallback,
    "wandb": integrations.WandbCallback,
    "trackio": integrations.TrackioCallback,
    "mlflow": integrations.MLflowCallback,
}


class Trackers:
    """Those of one start of a run, through all its phases. Leaving the context ends them; on other ranks than the first
    there are none.
    """

    def __init__(self, config: RunConfig, *, first: bool) -> None:
        self._config, self._run_dir = config, Path(config.checkpoint.run_dir)
        self._names = config.logging.every_tracker if first else ()
        self._threads: list[_Tracker] = []
        self._were_set: list[str] = []

    def begin(self, args: Any, state: Any, model: Any, *, parameters: int) -> None:
        """Start them before the first step; a later phase is of the same start. `model` gives its configuration, and
        `parameters` is its whole size: its own are shards.
        """
        if self._threads or not self._names:
            return
        run = run_folder.run_of(self._run_dir) or ""
        self._settle(run)
        args = copy.copy(args)
        args.deepspeed = without_secrets(args.deepspeed)  # callbacks send all fields, the user's engine.deepspeed too
        args.run_name = f"{self._run_dir.name}-{run[:6]}"
        args.project = os.environ["WANDB_PROJECT"]
        described = _Described(model.config, self._config, parameters)
        for name in self._names:
            tracker = _Tracker(name, partial(self._callback, name))
            tracker.send("on_train_begin", args, state, model=described)
            self._threads.append(tracker)

    def log(self, args: Any, state: Any, logs: Mapping[str, Any]) -> None:
        """Send the numbers of a line of the history."""
        numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        for pattern, rate in logs.get("learning_rates", {}).items():
            numbers[f"learning_rate_{pattern or 'others'}"] = rate
        for tracker in self._threads:
            tracker.send("on_log", args, state, logs=numbers)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for tracker in self._threads:
            tracker.end(failed=kind is not None)
        deadline = time.monotonic() + CLOSING_S
        for tracker in self._threads:
            if not tracker.ended(max(0.0, deadline - time.monotonic())):
                warn(f"logging.trackers: {tracker.name} did not end within {CLOSING_S:g} s; its last lines may be lost")
        self._threads = []
        for name in self._were_set:
            os.environ.pop(name, None)
        self._were_set = []

    def _settle(self, run: str) -> None:
        """The trackers' own settings, where the user's environment has none."""
        for name, value in {
            "WANDB_PROJECT": "dora_dist",
            "WANDB_DIR": str(self._run_dir),
            "WANDB_CONSOLE": "off",  # what the run prints is its own
            "WANDB_RUN_ID": run,
            "WANDB_RESUME": "allow",  # a run that is resumed is one run
            "WANDB_LOG_MODEL": "false",
            "MLFLOW_EXPERIMENT_NAME": "dora_dist",
        }.items():
            self._set(name, value)
        if "wandb" in self._names and not _has_wandb_key() and "WANDB_MODE" not in os.environ:
            self._set("WANDB_MODE", "offline")  # it would ask for a key, and nobody could answer
            note(
                f"logging.trackers: no API key of wandb here: recorded offline; wandb sync {self._run_dir}/wandb/*run*"
            )

    def _set(self, name: str, value: str) -> None:
        """Set a variable of the environment that is not set, until the run ends: the next one may be another."""
        if name not in os.environ:
            os.environ[name] = value
            self._were_set.append(name)

    def _callback(self, name: str) -> Any:
        callback = _CALLBACKS[name]()
        if name == "tensorboard":  # one folder for a run whatever it is resumed from: one curve per metric
            callback.logging_dir = callback.logging_dir or str(self._run_dir / run_folder.TENSORBOARD)
        return callback


class _Tracker:
    """One tracker's thread, and what waits for it."""

    def __init__(self, name: str, callback: Callable[[], Any]) -> None:
        self.name, self._make = name, callback
        self._waiting: queue.Queue[tuple[str, tuple[Any, ...], dict[str, Any]] | None] = queue.Queue(MOST_WAITING)
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def send(self, method: str, args: Any, state: Any, **fields: Any) -> None:
        """Have the thread call a method of the callback, with the state as it is now. Waits for nothing."""
        try:
            self._waiting.put_nowait((method, (args, copy.copy(state), None), fields))
        except queue.Full:
            self._leave(f"{MOST_WAITING:,} lines wait for it")

    def end(self, *, failed: bool) -> None:
        """Have it end its run, once it has what was sent."""
        try:
            self._waiting.put_nowait(("failed" if failed else "finished", (), {}))
            self._waiting.put_nowait(None)
        except queue.Full:
            self._leave(f"{MOST_WAITING:,} lines wait for it")

    def ended(self, seconds: float) -> bool:
        """Whether it has ended within so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            callback = self._make()
            last: tuple[Any, ...] = ()
            while (call := self._waiting.get()) is not None:
                method, positions, fields = call
                if positions:
                    last = positions
                    getattr(callback, method)(*positions, **fields)
                elif last:
                    _end(self.name, callback, last, failed=method == "failed")
        except Exception as error:  # whatever a tracker raises, the run is not over
            self._leave(f"{type(error).__name__}: {error}")

    def _leave(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            warn(f"logging.trackers: {self.name} failed, and the run goes on without it ({redacted(why)})")


def _end(name: str, callback: Any, last: Sequence[Any], *, failed: bool) -> None:
    if name == "mlflow" and failed:
        callback._ml_flow.end_run("FAILED")
    callback.on_train_end(*last)
    if name == "wandb":  # whose callback leaves this to the interpreter's end
        callback._wandb.finish(exit_code=int(failed))


class _Described:
    """What the callbacks ask a model for: its configuration, joined by the run's own, and its size."""

    def __init__(self, config: Any, run: RunConfig, parameters: int) -> None:
        self._parameters = parameters
        fields = {**config.to_dict(), **described(run)}
        text = f"{json.dumps(without_secrets(run.model_dump(mode='json')), indent=2)}\n{config.to_json_string()}"
        self.config = SimpleNamespace(to_dict=lambda: fields, to_json_string=lambda: text)

    def num_parameters(self) -> int:
        return self._parameters


def described(run: RunConfig) -> dict[str, Any]:
    """Every field of a run by its dotted name, without what may be a secret."""
    fields = values(run.model_dump(mode="json"), type(run))
    return {name: without_secrets(value) for name, value in fields.items()}


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return netrc.is_file() and bool(server) and str(server) in netrc.read_text(errors="replace")
    except (OSError, RuntimeError):  # one that may not be read, or a user without a home
        return False
