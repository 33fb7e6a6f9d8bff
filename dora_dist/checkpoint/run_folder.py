"""What a run leaves on disk, and where: the one place that knows the folder's layout.

RUN_DIR/
    config.json  deepspeed.json  metrics.jsonl  analysis.jsonl  run.log  report.html  tensorboard/
    .in_use
    run.json                       {"run": ...}: which run this is; every checkpoint's manifest says the same
    best.json                      {"checkpoint": "checkpoint-80", "eval_loss": ...}, or another metric
    checkpoint-80/
        manifest.json              written last: step, what it was trained with (`resuming.record`), every file's
                                   size and sha256, and a checksum of its own
        state.safetensors          fp32 masters and Adam moments, whole tensors: no trace of the world size; where they
                                   are large, state-00001-of-00008.safetensors, ...: pieces of them (`state.py`)
        trainer_state.json
        adapter/                   an adapter folder, with the tokenizer
        tokenizer/                 in its place where the method has no adapter
"""

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_dist.checkpoint.manifest import ADAPTER, MANIFEST, NAME, Damaged, is_complete, read_manifest
from dora_dist.runtime.console import warn
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import new_file, write_json

CONFIG, TRAINER_STATE, TOKENIZER = "config.json", "trainer_state.json", "tokenizer"
DEEPSPEED, LOG, TENSORBOARD = "deepspeed.json", "run.log", "tensorboard"
METRICS, ANALYSIS = "metrics.jsonl", "analysis.jsonl"
RUN, BEST, REPORT = "run.json", "best.json", "report.html"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step belongs."""
    return run_dir / f"checkpoint-{step}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. A folder without a readable manifest is not one."""
    found = {}
    for folder in run_dir.glob("checkpoint-*"):
        name = NAME.fullmatch(folder.name)
        if name and is_complete(folder):
            found[int(name[1])] = folder
    return [found[step] for step in sorted(found)]


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def newest_intact(run_dir: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was written.

    Damaged and incomplete ones that are newer are named, with what is wrong, and set aside under another name: what
    comes later must not take them for good. Raises UserError for one that does not belong here: renamed, edited,
    copied from another run, or of another version.
    """
    for folder in sorted(_named(run_dir), key=step_of, reverse=True):
        try:
            check_run(folder, read_manifest(folder))
            return folder
        except Damaged as error:
            warn(f"{error}; it is now {_set_aside(folder, 'damaged')}, looking for an earlier one")
    return None


def set_aside_after(run_dir: Path, step: int) -> None:
    """Rename the checkpoints of later steps than the one a run goes on from: they are of another course of it."""
    for folder in _named(run_dir):
        if step_of(folder) > step:
            name = folder.name
            warn(f"{name} is later than checkpoint-{step}, which the run goes on from: {_set_aside(folder, 'later')}")


def _named(run_dir: Path) -> list[Path]:
    return [folder for folder in run_dir.glob("checkpoint-*") if NAME.fullmatch(folder.name)]


def _set_aside(folder: Path, why: str) -> str:
    aside = folder.with_name(f"{folder.name}.{why}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside.name


def run_of(run_dir: Path) -> str | None:
    """Which run a folder belongs to; None if it does not say."""
    try:
        return str(json.loads((run_dir / RUN).read_text())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def name_run(run_dir: Path, resume: Path | None) -> None:
    """Write run.json: a run that starts, or that goes on from another folder's checkpoint, gets a name of its own."""
    own = resume is not None and resume.resolve().parent == run_dir.resolve()
    known = (run_of(run_dir) or read_manifest(resume, verify=False).get("run")) if own and resume else None
    write_json(run_dir / RUN, {"run": known or uuid.uuid4().hex})


def check_run(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint was written by another run than the one whose folder it is in."""
    here = run_of(folder.parent)
    if here is not None and manifest.get("run") != here:
        raise UserError(
            f"checkpoint.resume: {folder} was written by another run than the one in {folder.parent}; move it "
            "elsewhere, and name it in --checkpoint.resume, with another checkpoint.run_dir, to go on from it"
        )


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint folder: its name says it, or else its manifest."""
    name = NAME.fullmatch(folder.name)
    return int(name[1]) if name else int(json.loads((folder / MANIFEST).read_text())["step"])


def clear_leftovers(run_dir: Path) -> None:
    """Remove what processes that were killed while they wrote have left. For a run that holds `InUse` alone."""
    for pattern in (".checkpoint-*.partial-*", ".checkpoint-*.old-*"):
        for leftover in run_dir.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def log_file(run_dir: Path, host: str, first_host: str) -> Path:
    """The log of the ranks on `host`: run.log on the first rank's host, a file of its own for each other.

    Machines that append to one file of a file server can lose lines.
    """
    return run_dir / (LOG if host == first_host else f"{Path(LOG).stem}.{host}.log")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; lines that a killed process began are left out."""
    path = run_dir / METRICS
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _is_up_to(line, 2**63)]


def forget_after(run_dir: Path, step: int) -> None:
    """Drop what metrics.jsonl and analysis.jsonl say of later steps than the one a run goes on from: they will happen
    again. That the run started and how it ended stays.
    """
    for name in (METRICS, ANALYSIS):
        if (run_dir / name).exists():
            _forget_lines_after(run_dir / name, step)


def _forget_lines_after(path: Path, step: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)  # a text would be split within its values, too
    kept = [line for line in lines if _is_up_to(line, step) or _is_of_a_start(line)]
    if kept != lines:
        with new_file(path, alone=True) as partial:
            partial.write_bytes(b"".join(kept))


def _is_up_to(line: bytes, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False  # a line that a killed process began


def _is_of_a_start(line: bytes) -> bool:
    return _is_up_to(line, 2**63) and json.loads(line).get("event") in ("start", "end")


def best_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint that was best in evaluation, if the run kept one."""
    best = _best(run_dir)
    return best[0] if best is not None and is_complete(best[0]) else None


def _best(run_dir: Path) -> tuple[Path, str] | None:
    """The checkpoint that best.json names, whether or not it is there, and `eval_loss (0.41)`."""
    try:
        fields = json.loads((run_dir / BEST).read_text())
        folder = run_dir / Path(fields.pop("checkpoint")).name
        [(metric, value)] = fields.items()
        return folder, f"{metric} ({value:.4g})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class Choice:
    """The checkpoint that is a run's result, and why; `newest` is a later one, where there is one."""

    folder: Path
    reason: str
    newest: Path | None = None

    def told(self, command: str) -> str:
        """In words, with how to get the newest: `command` is what to type for {}, such as "evaluate {}"."""
        typed = command.replace("{}", str(self.newest))
        other = f"; the newest: dora-dist {typed}" if self.newest is not None else ""
        return f"{self.folder}, {self.reason}{other}"


def chosen(run_dir: Path) -> Choice | None:
    """Which checkpoint a run folder means: the best by evaluation if the run kept one, else the newest.

    None for a folder without complete checkpoints.
    """
    found = checkpoints(run_dir)
    if not found:
        return None
    newest, count = found[-1], f"of {len(found)} checkpoints"
    best = _best(run_dir)
    if best is None:
        return Choice(newest, f"the newest {count}" if len(found) > 1 else "the only checkpoint")
    folder, by = best
    if folder not in found:
        return Choice(newest, f"the newest {count}, as {folder.name}, the best by {by}, is gone or incomplete")
    if folder == newest:
        return Choice(folder, f"the best {count} by {by}, and the newest" if len(found) > 1 else "the only checkpoint")
    return Choice(folder, f"the best {count} by {by}", newest)


def config_of(adapter: Path) -> dict[str, Any]:
    """The configuration of the run that an adapter folder, or a checkpoint, lies in, as it was written; {} if it lies
    in none.
    """
    place = adapter.resolve()
    checkpoint = place.parent if place.name == ADAPTER else place
    file = checkpoint.parent / CONFIG
    if not (checkpoint / MANIFEST).is_file() or not file.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); correct it, or move the adapter away from it") from error
    return config


def set_best(run_dir: Path, checkpoint: Path, value: float, *, metric: str = "eval_loss") -> None:
    """Record the best checkpoint and its metric; atomic."""
    write_json(run_dir / BEST, {"checkpoint": checkpoint.name, metric: value})


def retire(run_dir: Path, keep_last: int) -> list[Path]:
    """Delete the oldest complete checkpoints beyond `keep_last`, never the best one. Returns what was deleted."""
    best = best_checkpoint(run_dir)
    old = [c for c in checkpoints(run_dir)[:-keep_last] if c != best]
    for folder in old:
        # The manifest goes first: a deletion cut short must not look like a checkpoint.
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)
    return old
