"""From results to tables and a figure: means over seeds, their spread, and differences from LoRA seed by seed."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claimbench.methods import REFERENCE, Method
from claimbench.runs import Result, Settings


@dataclass
class Row:
    """A method at a size on a task: the learning rate, and by seed the accuracies and which texts are right."""

    rate: float
    accuracies: list[float] = field(default_factory=list)
    right: list[str] = field(default_factory=list)
    trained_numbers: list[int] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.accuracies.append(result["accuracy"])
        self.right.append(result["right"])
        self.trained_numbers.append(result["trained_numbers"])


Key = tuple[str, str, int]
"""Task, method, r."""


@dataclass
class Found:
    """All that a table says; `rows` have the same seeds in the same order."""

    settings: Settings
    methods: dict[str, Method]
    r: int
    seeds: list[int]
    sweeps: dict[tuple[str, str], Any]
    baselines: dict[str, tuple[str, float]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    rows: dict[Key, Row] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _, _ in self.rows))

    @property
    def kinds(self) -> list[tuple[str, int]]:
        """Methods at their sizes, whole ones first."""
        found = dict.fromkeys((name, r) for _, name, r in self.rows)
        return sorted(found, key=lambda kind: kind[1] != self.r)

    def title(self, name: str, r: int) -> str:
        method = self.methods[name]
        return f"{method.title}, r = {r}" if method.sized else method.title

    def as_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "batch": self.settings.batch,
            "seeds": self.seeds,
            "baselines": {task: dict([found]) for task, found in self.baselines.items()},
            "variants": {name: list(m.options) for name, m in self.methods.items() if m.options},
            "validation": [
                {"task": task, "method": name, "accuracy_by_rate": rates} for (task, name), rates in self.sweeps.items()
            ],
            "test": [
                {"task": t, "method": name, "r": r, "learning_rate": row.rate, "accuracy": row.accuracies}
                | {"trained_numbers": row.trained_numbers}
                for (t, name, r), row in self.rows.items()
            ],
        }


@dataclass(frozen=True)
class Difference:
    """Of two methods, paired: the mean, the standard deviation over seeds, and what other texts would change."""

    mean: float
    spread: float
    of_texts: float

    @classmethod
    def of(cls, row: Row, other: Row) -> "Difference":
        """The mean of row − other over seeds. `of_texts` is the standard error of that mean over texts, each
        of which has the difference of how often both rows have it right."""
        by_seed = [a - b for a, b in zip(row.accuracies, other.accuracies, strict=True)]
        pairs = [list(zip(a, b, strict=True)) for a, b in zip(row.right, other.right, strict=True)]
        by_text = [statistics.mean(int(a) - int(b) for a, b in same) for same in zip(*pairs, strict=True)]
        error = spread(by_text) / len(by_text) ** 0.5
        return cls(statistics.mean(by_seed), spread(by_seed), error)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.spread:.4f} ({self.of_texts:.4f})"


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def tables(found: Found) -> str:
    """Markdown: one table for each task, one over all tasks, one of the validation."""
    seeds = ", ".join(map(str, found.seeds))
    lines = [
        f"Seeds {seeds}. Accuracy: mean ± standard deviation over seeds. Differences: of the same seed, mean ± "
        "standard deviation; in brackets the standard error over test texts.",
        "",
    ]
    for task in found.tasks:
        lines += [*_of_task(found, task), ""]
    return "\n".join([*lines, *_over_tasks(found), "", *_validation(found)]) + "\n"


def _of_task(found: Found, task: str) -> list[str]:
    texts = len(found.rows[task, REFERENCE, found.r].right[0])
    words, untrained = found.baselines[task]
    lines = [
        f"{task}: {found.steps[task]} steps of {found.settings.batch}; {texts:,} test texts; {words} {untrained:.4f}",
        "",
        f"| | trained numbers | learning rate | accuracy | minus LoRA of its size | minus LoRA, r = {found.r} |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in found.kinds:
        row = found.rows[task, name, r]
        numbers = statistics.mean(row.trained_numbers)
        accuracy = f"{statistics.mean(row.accuracies):.4f} ± {spread(row.accuracies):.4f}"
        own = _difference(found, (task, name, r), r) if found.methods[name].sized else None
        whole = _difference(found, (task, name, r), found.r)
        lines.append(
            f"| {found.title(name, r)} | {numbers:,.0f} | {row.rate:g} | {accuracy} | {own or ''} | {whole or ''} |"
        )
    return lines


def _difference(found: Found, key: Key, r: int) -> Difference | None:
    """From LoRA with `r`; None of itself, and where that was not run."""
    reference = (key[0], REFERENCE, r)
    if key == reference or reference not in found.rows:
        return None
    return Difference.of(found.rows[key], found.rows[reference])


def _over_tasks(found: Found) -> list[str]:
    """The mean over tasks of each seed's difference."""
    lines = [
        f"Over {len(found.tasks)} tasks: the mean difference of each seed, ± its standard deviation over seeds",
        "",
        f"| | minus LoRA of its size | minus LoRA, r = {found.r} |",
        "|---|---|---|",
    ]
    for name, r in found.kinds:
        own = _mean_over_tasks(found, name, r, r) if found.methods[name].sized else ""
        lines.append(f"| {found.title(name, r)} | {own} | {_mean_over_tasks(found, name, r, found.r)} |")
    return lines


def _mean_over_tasks(found: Found, name: str, r: int, size: int) -> str:
    pairs = [
        (found.rows[task, name, r].accuracies, found.rows[task, REFERENCE, size].accuracies)
        for task in found.tasks
        if (task, REFERENCE, size) in found.rows
    ]
    if not pairs or (name, r) == (REFERENCE, size):
        return ""
    by_task = [[a - b for a, b in zip(ours, theirs, strict=True)] for ours, theirs in pairs]
    by_seed = [statistics.mean(same) for same in zip(*by_task, strict=True)]
    return f"{statistics.mean(by_seed):+.4f} ± {spread(by_seed):.4f}"


def _validation(found: Found) -> list[str]:
    said = "Validation accuracy by learning rate (mean over the sweep's seeds):"
    lines = [said, "", "| task | method | |", "|---|---|---|"]
    for (task, name), rates in found.sweeps.items():
        if not rates:  # of one there was nothing to choose
            continue
        cells = ", ".join(f"{rate:g}: {rates[rate]:.4f}" for rate in sorted(rates))
        lines.append(f"| {task} | {found.methods[name].title} | {cells} |")
    return lines


def plot(found: Found, path: Path) -> None:
    """A column for each task: above, every seed's accuracy with its mean; below, validation accuracy by rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(found.methods, [*pyplot.cm.tab10.colors, *pyplot.cm.Dark2.colors] * 9, strict=False))
    size = (1.5 + 4.2 * len(found.tasks), 2.6 + 0.28 * len(found.kinds) + 2.6)
    figure, axes = pyplot.subplots(2, len(found.tasks), figsize=size, layout="constrained", squeeze=False)
    for column, task in enumerate(found.tasks):
        above, below = axes[0][column], axes[1][column]
        for place, (name, r) in enumerate(found.kinds):
            values, colour = found.rows[task, name, r].accuracies, colours[name]
            above.plot(values, [place] * len(values), ".", color=colour, alpha=0.5)
            above.errorbar(
                statistics.mean(values), place, xerr=spread(values), fmt="o", color=colour, capsize=3, markersize=5
            )
        above.set_yticks(range(len(found.kinds)), [found.title(*kind) for kind in found.kinds], fontsize=8)
        above.invert_yaxis()
        above.axvline(statistics.mean(found.rows[task, REFERENCE, found.r].accuracies), color="0.7", linewidth=0.8)
        above.set_title(f"{task}: test accuracy", fontsize=10)
        for name, method in found.methods.items():
            rates = found.sweeps[task, name]
            at = sorted(rates)
            below.plot(at, [rates[rate] for rate in at], ".-", color=colours[name], label=method.title)
        below.set_xscale("log")
        below.set_xlabel("learning rate (validation accuracy)", fontsize=8)
    axes[1][0].legend(fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
