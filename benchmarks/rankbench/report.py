"""From runs to a summary, a table and a plot."""

import statistics
from pathlib import Path
from typing import Any

from rankbench.runs import METHODS, TASKS, Settings


def summary(results: dict[str, list[dict[str, Any]]], settings: Settings) -> dict[str, Any]:
    """results[method][seed] -> by method: the metric's mean and sample standard deviation, every value, and sizes."""
    entries = {}
    for name, runs in results.items():
        found = [run["metric"] for run in runs]
        entries[name] = {
            "r": round(METHODS[name].share * settings.r),
            "metric": found,
            "mean": statistics.mean(found),
            "deviation": statistics.stdev(found) if len(found) > 1 else 0.0,
            "parameters_at_start": runs[0]["parameters_at_start"],
            "parameters_at_end": [run["parameters_at_end"] for run in runs],
            "steps": runs[0]["steps"],
        }
    return entries


def table(report: dict[str, Any]) -> str:
    """Markdown, one table a task."""
    lines = []
    for task_name, found in report["tasks"].items():
        task, settings = TASKS[task_name], report["settings"]
        seeds, limit = settings["seeds"], settings["limit"]
        steps = next(iter(found["methods"].values()))["steps"]
        rates = ", ".join(f"{METHODS[name].title} {rate:g}" for name, rate in found["learning_rates"].items())
        lines += [
            f"{task_name}: {task.encoder}, {min(task.train, limit):,} texts, {steps} steps of {settings['batch']}; "
            f"{task.metric} on {min(task.test, limit):,} held-out texts; learning rates: {rates}",
            "",
            f"| | adapter parameters, start | end | {task.metric} | seeds {', '.join(map(str, seeds))} |",
            "|---|---|---|---|---|",
        ]
        for name, entry in found["methods"].items():
            end, values = statistics.mean(entry["parameters_at_end"]), ", ".join(f"{v:.4f}" for v in entry["metric"])
            lines.append(
                f"| {METHODS[name].title}, r = {entry['r']} | {entry['parameters_at_start']:,} | {end:,.0f} | "
                f"{entry['mean']:.4f} ± {entry['deviation']:.4f} | {values} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Every seed's metric over the parameters that are left, one panel a task; bars span one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = report["tasks"]
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.6), layout="constrained", squeeze=False)
    for axis, (task_name, found) in zip(axes[0], tasks.items(), strict=True):
        for (name, entry), colour in zip(found["methods"].items(), pyplot.cm.tab10.colors, strict=False):
            size = statistics.mean(entry["parameters_at_end"])
            axis.plot(entry["parameters_at_end"], entry["metric"], ".", color=colour, alpha=0.5)
            label = f"{METHODS[name].title}, r = {entry['r']}"
            axis.errorbar(size, entry["mean"], entry["deviation"], fmt="o", capsize=3, color=colour, label=label)
        axis.set_title(f"{task_name}: {TASKS[task_name].encoder}", fontsize=10)
        axis.set_xlabel("adapter parameters at the end")
        axis.set_ylabel(TASKS[task_name].metric)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
