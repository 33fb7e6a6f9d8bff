"""A run as its folder tells it, whatever is missing there: running or ended, of this version or of an earlier one."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dora_dist.analysis.decomposition import Recording
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.manifest import MANIFEST
from dora_dist.runtime.errors import UserError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What is known of a run. Records are the lines of metrics.jsonl in their order; none need have any field."""

    title: str
    folder: Path
    config: Record = field(default_factory=dict)
    records: Sequence[Record] = ()
    recordings: Sequence[Recording] = ()
    saved: Sequence[int] = ()
    """Steps of the complete checkpoints that are there now."""
    best: str | None = None
    """Name of the checkpoint that was best in evaluation."""
    planned: int | None = None
    """Optimizer steps of the whole run, where a checkpoint says so."""
    notes: Sequence[str] = ()
    """What could not be read, and why."""

    def of(self, *events: str) -> list[Record]:
        """The history's lines of these events."""
        return [record for record in self.records if record.get("event") in events]

    def setting(self, name: str, otherwise: Any = None) -> Any:
        """The value of a field of the configuration by its dotted name."""
        section, _, key = name.rpartition(".")
        holder = self.config.get(section, {}) if section else self.config
        return holder.get(key, otherwise) if isinstance(holder, Mapping) else otherwise

    @cached_property
    def since_start(self) -> Sequence[Record]:
        """The records of the last start, or all where none says that it is one."""
        starts = [place for place, record in enumerate(self.records) if record.get("event") == "start"]
        return self.records[starts[-1] :] if starts else self.records

    @cached_property
    def step(self) -> int:
        """The newest optimizer step that anything is known of. Where an earlier start ended is not: the last one may
        have gone on from before that.
        """
        before = self.records[: len(self.records) - len(self.since_start)]
        known = [*(r for r in before if r.get("event") not in ("start", "end")), *self.since_start]
        steps = [int(r["step"]) for r in known if isinstance(r.get("step"), int | float)]
        return max([0, *steps, *self.saved])

    @cached_property
    def steps(self) -> int | None:
        """Optimizer steps of the whole run."""
        said = [record["steps"] for record in self.of("start") if isinstance(record.get("steps"), int)]
        known = [*said[-1:], self.planned, self.setting("training.max_steps")]
        return next((count for count in known if count), None)

    @cached_property
    def ending(self) -> Record | None:
        """How the last start ended; None while it goes on, and where the history does not say."""
        last = next((r for r in reversed(self.records) if r.get("event") in ("start", "end")), {})
        return last if last.get("event") == "end" else None

    @property
    def finished(self) -> bool:
        """Whether the run has come to its last step."""
        if self.of("start"):
            return self.ending is not None and self.ending.get("how") == "finished"
        return bool(self.steps and self.saved and self.saved[-1] >= self.steps)

    def last(self, key: str) -> Any:
        """The newest value of a field of the records; None for none."""
        return next((r[key] for r in reversed(self.records) if r.get(key) is not None), None)


def read(folder: Path, title: str | None = None) -> Run:
    """The run of a folder. Parts that are missing are left out, and unreadable ones are named in its notes.

    Raises UserError where there is no run at all.
    """
    config_file, metrics = folder / run_folder.CONFIG, folder / run_folder.METRICS
    if not folder.is_dir() or not (config_file.is_file() or metrics.is_file()):
        missing = f"holds neither {run_folder.CONFIG} nor {run_folder.METRICS}"
        raise UserError(f"{folder}: {missing if folder.is_dir() else 'is not a folder'}; give the folder of a run")
    notes: list[str] = []
    config = _json_object(config_file, notes)
    records = list(_lines(metrics, notes, lambda line: line if isinstance(line, dict) else None))
    recordings = {r.step: r for r in _lines(folder / run_folder.ANALYSIS, notes, Recording.of)}
    checkpoints = run_folder.checkpoints(folder)
    best = run_folder.best_checkpoint(folder)
    return Run(
        title or folder.resolve().name,
        folder,
        config,
        records,
        [recordings[step] for step in sorted(recordings)],
        [run_folder.step_of(checkpoint) for checkpoint in checkpoints],
        best.name if best is not None else None,
        _planned(checkpoints),
        notes,
    )


def _json_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        notes.append(f"{path.name} is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
    return {}


def _lines(path: Path, notes: list[str], of: Callable[[Any], Any]) -> Iterator[Any]:
    """What `of` makes of each line's JSON. A last line that is still being written is left out without a note."""
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return
    bad = 0
    for line in lines:
        try:
            found = of(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            found = None
        if found is not None:
            yield found
        else:
            bad += line.endswith(b"\n")
    if bad:
        notes.append(f"{path.name}: {bad:,} {'line' if bad == 1 else 'lines'} left out, which cannot be read")


def _planned(checkpoints: Sequence[Path]) -> int | None:
    for folder in reversed(checkpoints):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((folder / run_folder.TRAINER_STATE).read_text())["max_steps"])
    return None


def ranks_of(run: Run) -> int | None:
    """Ranks of the last start; of a run whose history does not say, those that wrote the newest checkpoint."""
    said = run.last("ranks")
    if said is None and run.saved:
        manifest = run.folder / f"checkpoint-{run.saved[-1]}" / MANIFEST
        with suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads(manifest.read_text())["trained_with"]["ranks"])
    return said if isinstance(said, int) else None


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one title with as much of their folder's path as tells them from one another."""
    found = []
    for run in runs:
        others = [other.folder.resolve() for other in runs if other is not run and other.title == run.title]
        own = run.folder.resolve().parts
        parts = next((n for n in range(1, len(own)) if all(o.parts[-n:] != own[-n:] for o in others)), 0)
        found.append(replace(run, title=str(Path(*own[-parts:]))) if others and parts else run)
    return found
