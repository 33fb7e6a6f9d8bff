"""What the page draws as curves: which quantities of the history make a chart, and their points, thinned."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dora_dist.report.reading import Run

MOST_POINTS = 600
"""Of one curve; of more, the smallest and the largest of each stretch are shown, so that no spike is lost."""
DIGITS = 6


@dataclass(frozen=True)
class Quantity:
    """A field of the history's lines: what people call it, and how its values are written ("form" of charts.js)."""

    key: str
    name: str
    form: str = "number"
    noisy: bool = False
    """Whether it scatters from step to step: shown smoothed as well."""
    starts_as: str | None = None
    """Field that has its value at step 0, for one that holds until it is next said: drawn in stairs."""


@dataclass(frozen=True)
class Topic:
    """Quantities that belong into one chart of a run."""

    name: str
    title: str
    quantities: Sequence[Quantity]
    log: bool = False
    """Whether a logarithmic axis is offered."""
    about: str = ""


TOPICS = (
    Topic("loss", "Loss", (Quantity("loss", "training", noisy=True), Quantity("eval_loss", "evaluation")), log=True),
    Topic("learning-rate", "Learning rate", (Quantity("learning_rate", "learning rate", "exponent"),), log=True),
    Topic("gradient", "Gradient norm", (Quantity("grad_norm", "gradient norm", noisy=True),), log=True),
    Topic(
        "throughput",
        "Throughput",
        (Quantity("tokens_per_second", "tokens a second", "count", noisy=True),),
        about="tokens a second, all ranks together",
    ),
    Topic("step-time", "Time of a step", (Quantity("seconds_per_step", "seconds a step", "seconds", noisy=True),)),
    Topic("step-tokens", "Tokens of a step", (Quantity("tokens_per_step", "tokens", "count", noisy=True),)),
    Topic("mfu", "Utilisation", (Quantity("mfu", "MFU", "percent", noisy=True),), about="of the device's peak FLOP/s"),
    Topic("filled", "Filled places", (Quantity("filled", "filled", "percent"),), about="share that is not padding"),
    Topic("memory", "Peak memory", (Quantity("peak_memory_gb", "of the fullest rank", "gigabytes"),)),
    Topic(
        "share",
        "Share of the time",
        (
            Quantity("norm_refresh_share", "row norms", "percent", noisy=True),
            Quantity("scoring_share", "importance and pruning", "percent", noisy=True),
        ),
        about="what the adapters' bookkeeping takes of a step",
    ),
    Topic(
        "budget",
        "Component budget",
        (
            Quantity("components_kept", "open", "count", starts_as="components"),
            Quantity("components_budget", "allowed", "count", starts_as="components"),
        ),
        about="components of all layers together",
    ),
    Topic("penalty", "DEM penalty", (Quantity("dem_penalty", "penalty"),), log=True),
)
_NOT_DRAWN = {
    *("step", "steps", "epoch", "time", "elapsed", "left", "components", "seconds", "records_skipped"),
    *("saved_step", "save_stall_seconds", "save_seconds", "save_failed", "norm_refresh_bytes_per_step"),
    *("train_runtime", "train_loss", "components_by_layer"),
}
_OF_SOURCE, _LEARNT = "loss/", "learnt/"
_DRAWN_EVENTS = (None, "log", "evaluation", "pruning")
_WORDS = {"f1": "F1", "mfu": "MFU"}


@dataclass(frozen=True)
class Curve:
    name: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float | None]
    style: str = "plain"
    """"plain", "noisy" (also smoothed), "points" (few, each marked) or "stairs"."""

    def as_json(self) -> dict[str, Any]:
        xs, ys = thinned(self.xs, self.ys)
        return {"name": self.name, "colour": self.colour, "style": self.style, "x": xs, "y": [*map(_rounded, ys)]}


@dataclass(frozen=True)
class Chart:
    """One drawing; `marks` are steps at which the run was started again."""

    name: str
    title: str
    form: str
    curves: Sequence[Curve]
    log: bool = False
    about: str = ""
    marks: Sequence[int] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "form": self.form,
            "log": self.log and all(y > 0 for curve in self.curves for y in curve.ys if y is not None),
            "marks": list(self.marks),
            "curves": [curve.as_json() for curve in self.curves],
        }


def of_run(run: Run) -> list[Chart]:
    """The charts of one run, curves of one topic together."""
    marks = [int(start["step"]) for start in run.of("start")[1:] if isinstance(start.get("step"), int)]
    found = []
    for topic in topics([run]):
        form = topic.quantities[0].form
        curves = list(_curves(run, topic))
        if curves:
            found.append(Chart(topic.name, topic.title, form, curves, topic.log, topic.about, marks))
    return found


def of_runs(runs: Sequence[Run]) -> list[Chart]:
    """The charts of several runs: one of each quantity, with a curve for each run that has it."""
    found = []
    for topic in topics(runs):
        for quantity in topic.quantities:
            curves = [
                Curve(run.title, colour, *points, style=_style(quantity))
                for colour, run in enumerate(runs)
                if (points := _points(run, quantity))[0]
            ]
            name = quantity.name if quantity.name.lower() != topic.title.lower() else ""
            several = len(topic.quantities) > 1 and name
            title = f"{topic.title}: {name}" if several else topic.title
            if curves:
                found.append(
                    Chart(f"{topic.name}-{quantity.key}", title, quantity.form, curves, topic.log, topic.about)
                )
    return found


def topics(runs: Sequence[Run]) -> list[Topic]:
    """The topics above, in their order after loss a chart for the sources of a mixture and one for each metric of
    evaluation, and one for whatever else the histories hold in numbers.
    """
    known = {quantity.key for topic in TOPICS for quantity in topic.quantities}
    keys = dict.fromkeys(
        key
        for run in runs
        for record in run.records
        if record.get("event") in _DRAWN_EVENTS
        for key, value in record.items()
        if key not in known | _NOT_DRAWN and (_is_number(value) or (key != "learning_rates" and _is_table(value)))
    )
    sources = [Quantity(key, key.removeprefix(_OF_SOURCE), noisy=True) for key in keys if key.startswith(_OF_SOURCE)]
    by_source = [Topic("loss-by-source", "Loss by source", sources, log=True)] if sources else []
    single = [key for key in keys if not key.startswith((_OF_SOURCE, _LEARNT))]
    further = [Topic(key, _title(key), (Quantity(key, _title(key).lower()),)) for key in single]
    metrics = [topic for topic in further if topic.name.startswith("eval_")]
    others = [topic for topic in further if not topic.name.startswith("eval_")]
    return [TOPICS[0], *by_source, *metrics, *TOPICS[1:], *others]


def _curves(run: Run, topic: Topic) -> Iterator[Curve]:
    colour = 0
    for quantity in topic.quantities:
        tables = "learning_rates" if quantity.key == "learning_rate" else quantity.key
        found = {name: values(run, tables, name) for name in _parts(run, tables)}
        if not found:
            found = {"": _points(run, quantity)}
        for name, points in found.items():
            if points[0]:
                label = (name or "others") if len(found) > 1 else name or quantity.name
                yield Curve(label, colour, *points, style=_style(quantity))
                colour += 1


def _style(quantity: Quantity) -> str:
    if quantity.starts_as is not None:
        return "stairs"
    return "noisy" if quantity.noisy else "points" if quantity.key.startswith("eval_") else "plain"


def _points(run: Run, quantity: Quantity) -> tuple[list[float], list[float | None]]:
    xs, ys = values(run, quantity.key)
    if xs and quantity.starts_as is not None:
        first = next((r[quantity.starts_as] for r in run.records if _is_number(r.get(quantity.starts_as))), None)
        return [0, *xs], [first, *ys]
    return xs, ys


def _parts(run: Run, key: str) -> list[str]:
    """The names in a field that is a table of numbers."""
    tables = (record[key] for record in run.records if _is_table(record.get(key)))
    return list(dict.fromkeys(str(name) for table in tables for name in table))


def values(run: Run, key: str, part: str | None = None) -> tuple[list[float], list[float | None]]:
    """Steps and values of a field, or of a part of one that is a table; what is said twice of a step counts once."""
    found: dict[float, float | None] = {}
    for record in run.records:
        value = record.get(key)
        if part is not None:
            value = value.get(part) if isinstance(value, Mapping) else None
        if key in record and _is_number(record.get("step")) and (_is_number(value) or (value is None and not part)):
            found[record["step"]] = value if value is not None and math.isfinite(value) else None
    if all(value is None for value in found.values()):
        return [], []
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def thinned(
    xs: Sequence[float], ys: Sequence[float | None], most: int = MOST_POINTS
) -> tuple[list[float], list[float | None]]:
    """At most `most` points: of each stretch the first, the smallest and the largest, and the last of all."""
    if len(xs) <= most:
        return list(xs), list(ys)
    size = math.ceil(len(xs) / ((most - 1) // 3))
    kept = {len(xs) - 1}
    for start in range(0, len(xs), size):
        places = [place for place in range(start, min(start + size, len(xs))) if ys[place] is not None]
        kept.add(start)
        if places:
            kept |= {min(places, key=lambda p: ys[p] or 0.0), max(places, key=lambda p: ys[p] or 0.0)}
    return [xs[place] for place in sorted(kept)], [ys[place] for place in sorted(kept)]


def table(chart: Chart, most: int = 25) -> tuple[list[str], list[list[Any]]]:
    """The chart as a table, for those who do not see it: its head, and rows of a step and each curve's value then."""
    steps = sorted({x for curve in chart.curves for x in curve.xs})
    if len(steps) > most:
        steps = [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]
    known = [dict(zip(curve.xs, curve.ys, strict=True)) for curve in chart.curves]
    return ["step", *(curve.name for curve in chart.curves)], [[x, *(c.get(x) for c in known)] for x in steps]


def _title(key: str) -> str:
    name = key.removeprefix("eval_").replace("_", " ")
    name = _WORDS.get(name, name[:1].upper() + name[1:])
    return f"Evaluation: {name}" if key.startswith("eval_") else name


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_number(item) for item in value.values())


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
