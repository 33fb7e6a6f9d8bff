"""What the page says in words and tables: how far the run is, its numbers, what happened, settings and versions."""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from dora_dist.adapters.methods import chosen
from dora_dist.config import AdapterConfig, RunConfig
from dora_dist.config.fields import REQUIRED, field_specs
from dora_dist.report.reading import Record, Run, ranks_of
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.secrets import without_secrets

_SILENCE_S = 900.0
"""A run whose history has no new line for so long has probably been killed."""
_UNIMPORTANT = ("checkpoint.run_dir", "checkpoint.resume")


@dataclass(frozen=True)
class State:
    """Where the run stands: a word, its look ("running", "good" or "bad"), and more words."""

    word: str
    look: str
    about: str


@dataclass(frozen=True)
class Tile:
    """A number that is seen first."""

    name: str
    value: str
    about: str = ""


@dataclass(frozen=True)
class Setting:
    name: str
    value: str
    default: str
    meaning: str
    changed: bool


def state(run: Run, *, now: float, live: bool = False) -> State:
    """`live`: whether the run writes this page itself; else it is taken to go on while its history grows."""
    of = f" of {run.steps:,}" if run.steps else ""
    at = f"step {run.step:,}{of}"
    if run.ending is not None:
        how, text = str(run.ending.get("how")), str(run.ending.get("text") or "")
        if how == "finished":
            early = [f", ended early: {r.get('text')}" for r in run.since_start if r.get("event") == "early_stop"]
            return State("Finished", "good", "".join([at, *early]))
        return State({"stopped": "Stopped", "lost": "Lost a rank"}.get(how, "Failed"), "bad", text or at)
    spoke = [record["time"] for record in run.records if _is_number(record.get("time"))]
    if live or (spoke and run.of("start") and now - spoke[-1] < _SILENCE_S):
        return State("Training" if run.step else "Starting", "running", at)
    if run.finished:
        return State("Finished", "good", at)
    if run.of("start"):
        return State("Ended", "bad", f"without a word, at {at}: it was killed, or its machine is gone")
    return State("Not finished", "bad" if of else "neutral", at)


def tiles(run: Run) -> list[Tile]:
    """The newest of the numbers that people look for."""
    return [tile for tile in _tiles(run) if tile.value]


def _tiles(run: Run) -> Iterator[Tile]:
    losses = _numbers(run, "loss")
    if losses:
        yield Tile("Training loss", f"{losses[-1]:.4g}", f"from {losses[0]:.4g}")
    for key, better in _evaluated(run).items():
        found = _numbers(run, key)
        name = key.removeprefix("eval_").replace("_", " ")
        best = better(found)
        about = f"best {best:.4g}" if best != found[-1] else f"from {found[0]:.4g}" if len(found) > 1 else ""
        yield Tile("Evaluation loss" if name == "loss" else f"Evaluation {name}", f"{found[-1]:.4g}", about)
    if rates := _numbers(run, "tokens_per_second"):
        ranks = ranks_of(run)
        on = f" on {_count(ranks, 'rank')}" if ranks else ""
        yield Tile("Throughput", f"{statistics.median(rates):,.0f}", f"tokens a second{on}")
    if memory := _numbers(run, "peak_memory_gb"):
        yield Tile("Peak memory", f"{max(memory):.2f} GB", "of the fullest rank")
    if kept := _numbers(run, "components_kept"):
        every = _numbers(run, "components")
        yield Tile("Components", f"{kept[-1]:,.0f}", f"open of {every[-1]:,.0f}" if every else "")
    if (spent := trained_seconds(run)) > 0:
        left = run.last("left") if run.ending is None and not run.finished else None
        yield Tile("Time", duration(spent), f"{duration(left)} left" if isinstance(left, int | float) and left else "")


def _evaluated(run: Run) -> dict[str, Any]:
    """The keys of evaluation, with which of several values is the best."""
    keys = dict.fromkeys(k for r in run.records for k, v in r.items() if k.startswith("eval_") and _is_number(v))
    ordered = sorted(keys, key=lambda key: key != "eval_loss")[:4]
    return {key: min if key == "eval_loss" else max for key in ordered}


def trained_seconds(run: Run) -> float:
    """Of all starts together: `elapsed` begins at 0 with each, and with each phase of one."""
    total = before = 0.0
    for now in _numbers(run, "elapsed"):
        if now < before:
            total += before
        before = now
    return total + before


def progress(run: Run) -> float | None:
    """From 0 to 1, where nothing is left to do."""
    if run.finished:
        return 1.0
    return min(run.step / run.steps, 1.0) if run.steps else None


def about(run: Run) -> list[str]:
    """What is trained with what, in a few words each."""
    start, model = (run.of(event)[-1:] or [{}] for event in ("start", "model"))
    adapter = run.config.get("adapter", {})
    r, trained = run.setting("adapter.r"), model[0].get("trained_parameters")
    name = str(run.setting("model.path", "")).rstrip("/").rpartition("/")[2]
    ranks = ranks_of(run)
    words = [
        name,
        _method(adapter) if adapter else "",
        f"r {r}" if r and isinstance(r, int) else "",
        f"{trained:,} parameters trained" if _is_number(trained) else "",
        _count(ranks, "rank") + (f" on {start[0]['device']}" if start[0].get("device") else "") if ranks else "",
    ]
    return [word for word in words if word]


def _method(adapter: Record) -> str:
    """What people call the method; its bare name, where no plugin is loaded that knows it."""
    try:
        return chosen(AdapterConfig.model_validate(adapter)).title
    except (UserError, ValueError):
        return str(adapter.get("method") or "")


def timeline(run: Run) -> list[tuple[str, str, str]]:
    """When (UTC), at which step, and what: starts, ends, prunings, saves, in their order."""
    found, running = [], False
    for record in run.records:
        text = _happened(record)
        if record.get("event") == "start":
            if running:
                found.append(("", "", "ended without a word: it was killed, or its machine was lost"))
            running = True
        running = running and record.get("event") != "end"
        if text:
            stamp = record.get("time")
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(stamp)) if _is_number(stamp) else ""
            found.append((when, f"{record['step']:,}" if _is_number(record.get("step")) else "", text))
    return found


def _happened(record: Record) -> str:
    """What a line of the history tells besides numbers; "" for nothing. Lines of version 0.1.0 have no event."""
    match record.get("event"):
        case "start":
            return _started(record)
        case "end":
            return ": ".join(str(record[key]) for key in ("how", "text") if record.get(key))
        case "early_stop":
            return f"ended early: {record.get('text')}"
        case "save_failed":
            return "a checkpoint could not be written"
    number = {key: value for key, value in record.items() if _is_number(value)}
    if "components_kept" in number:
        allowed = f", {number['components_budget']:,} allowed" if "components_budget" in number else ""
        return f"pruned: {number['components_kept']:,} components are open{allowed}"
    if "saved_step" in number:
        seconds = f" in {number['save_seconds']:.1f} s" if "save_seconds" in number else ""
        return f"saved checkpoint-{number['saved_step']:.0f}{seconds}"
    if "records_skipped" in number:
        return f"{number['records_skipped']:,.0f} records left out so far, which cannot be read"
    return ""


def _started(record: Record) -> str:
    ranks, nodes = record.get("ranks"), record.get("nodes")
    host = f" ({record['host']})" if record.get("host") else ""
    where = [
        f"on {_count(ranks, 'rank')}" if ranks else "",
        f"{_count(nodes, 'node')}{host}" if nodes else "",
        f"by {record['launcher']}" if record.get("launcher") not in (None, "none") else "",
    ]
    origin = record.get("resumed_from")
    head = f"went on from {str(origin).rpartition('/')[2]}" if origin else "started"
    changed = record.get("changed")
    changes = "; ".join(f"{k} {v}" for k, v in changed.items()) if isinstance(changed, Mapping) else ""
    return f"{head} {', '.join(filter(None, where))}" + (f"; changed: {changes}" if changes else "")


def settings(run: Run) -> list[Setting]:
    """Every field of the configuration, and what the schema does not know, those that depart from a default first.
    Pages are passed on, so values that may be secret are left out.
    """
    specs = field_specs(RunConfig)
    known = {}
    for name, value in _flat(without_secrets(run.config)):
        spec = specs.get(name)
        default = REQUIRED if spec is None else spec.default
        changed = default is REQUIRED or value != default
        shown = "" if default is REQUIRED else _text(default)
        known[name] = Setting(name, _text(value), shown, spec.description if spec else "", changed)
    return sorted(known.values(), key=lambda setting: not setting.changed)


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: name, and each run's value; "" where it has none. A field that a run
    of an earlier version does not have is at its default there.
    """
    specs = field_specs(RunConfig).values()
    defaults = {spec.name: _text(spec.default) for spec in specs if spec.default is not REQUIRED}
    tables = [{setting.name: setting.value for setting in settings(run)} for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    known = [(defaults if run.config else {}) | table for run, table in zip(runs, tables, strict=True)]
    rows = [(name, [table.get(name, "") for table in known]) for name in names if name not in _UNIMPORTANT]
    return [row for row in sorted(rows) if len(set(row[1])) > 1]


def numbers(runs: Sequence[Run], *, now: float) -> list[tuple[str, list[str]]]:
    """What each run came to: a row of a name and each run's text, "" where it has none."""
    rows: dict[str, list[str]] = {"state": [state(run, now=now).word for run in runs]}
    rows["steps"] = [f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else "") for run in runs]
    rows["training loss, last"] = [_form(_numbers(run, "loss")[-1:]) for run in runs]
    keys = dict.fromkeys(key for run in runs for key in _evaluated(run))
    for key in keys:
        name = key.removeprefix("eval_").replace("_", " ")
        rows[f"evaluation {name}, last"] = [_form(_numbers(run, key)[-1:]) for run in runs]
        better = min if key == "eval_loss" else max
        rows[f"evaluation {name}, best"] = [_form([better(n)] if (n := _numbers(run, key)) else []) for run in runs]
    rows["parameters trained"] = [_form([*_numbers(run, "trained_parameters")[-1:]], "{:,.0f}") for run in runs]
    rows["components open"] = [_form(_numbers(run, "components_kept")[-1:], "{:,.0f}") for run in runs]
    rates = [_numbers(run, "tokens_per_second") for run in runs]
    rows["tokens/s, median"] = [_form([statistics.median(r)] if r else [], "{:,.0f}") for r in rates]
    rows["peak memory"] = [
        _form([max(m)] if (m := _numbers(run, "peak_memory_gb")) else [], "{:.2f} GB") for run in runs
    ]
    rows["time"] = [duration(seconds) if (seconds := trained_seconds(run)) else "" for run in runs]
    rows["ranks"] = [str(ranks_of(run) or "") for run in runs]
    return [(name, texts) for name, texts in rows.items() if any(texts)]


def versions(run: Run) -> dict[str, str]:
    """Of the last start."""
    found = run.last("versions")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def duration(seconds: float) -> str:
    """Such as 41 s, 12 min 05 s, 3 h 02 min or 2 d 04 h."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02} h"
    if hours:
        return f"{hours} h {minute:02} min"
    return f"{minute} min {second:02} s" if minute else f"{second} s"


def _numbers(run: Run, key: str) -> list[float]:
    return [value for record in run.records if _is_number(value := record.get(key)) and value == value]


def _form(values: Sequence[float], form: str = "{:.4g}") -> str:
    return form.format(values[0]) if values else ""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(number: Any, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}" if isinstance(number, int) else ""


def _flat(config: Record) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield f"{name}.{key}", inner
        else:
            yield name, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
