"""From measurements to a summary, a table and a plot."""

import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stepbench.settings import VARIANTS, Settings

REFERENCES = ("peft-lora", "peft-dora", "deepspeed-full")


def summary(results: dict[str, list[list[dict[str, Any]]]], settings: Settings) -> dict[str, Any]:
    """What is written as JSON: flags, machine, versions, and for each variant its numbers and the raw seconds."""
    variants = {variant: _variant(rounds) for variant, rounds in results.items()}
    for entry in variants.values():
        entry["ratios"] = {
            name: entry["median_seconds"] / variants[name]["median_seconds"] for name in REFERENCES if name in variants
        }
    return {
        "settings": settings.as_dict(),
        "deepspeed_config": settings.deepspeed_config(),
        "device": next(iter(results.values()))[0][0]["device"],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
        },
        "variants": variants,
    }


def _variant(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    # Barriers on both sides: every rank's clock shows the same step, so rank 0's is enough.
    seconds = [s for ranks in rounds for s in ranks[0]["seconds"]]
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    every = [rank for ranks in rounds for rank in ranks]
    first, device = (
        rounds[0],
        [rank["peak_device_bytes"] for rank in every if rank["peak_device_bytes"] is not None],
    )
    received = first[0]["received_bytes"]
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "median_seconds": median,
        "min_seconds": min(seconds),
        "iqr_seconds": quartiles[2] - quartiles[0],
        "round_median_seconds": [statistics.median(ranks[0]["seconds"]) for ranks in rounds],
        "median_cpu_seconds": statistics.median(s for rank in every for s in rank["cpu_seconds"]),
        "peak_rss_bytes": max(rank["peak_rss_bytes"] for rank in every),
        "peak_rss_steps_bytes": max(rank["peak_rss_steps_bytes"] for rank in every),
        "peak_device_bytes": max(device) if device else None,
        "received_bytes": sum(received.values()),
        "received_bytes_by_kind": received,
        "collectives": first[0]["collectives"],
        "norm_refresh_bytes": first[0]["norm_refresh_bytes"],
        "norm_refresh_share": statistics.median(ranks[0]["norm_refresh_seconds"] for ranks in rounds) / median,
        "scoring_share": statistics.median(ranks[0]["scoring_seconds"] for ranks in rounds) / median,
        "trainable": first[0]["trainable"],
        "optimizer_bytes": max(rank["optimizer_bytes"] for rank in first),
        "open_components": sum(rank["open_components"] for rank in first),
        "first_loss": statistics.mean(rank["losses"][0] for rank in first),
        "losses": [statistics.mean(step) for step in zip(*(rank["losses"] for rank in first), strict=True)],
    }


def table(report: dict[str, Any]) -> str:
    """Plain text, one line a variant."""
    head = (
        f"{'variant':25s}{'median s':>9s}{'min':>8s}{'IQR':>7s}{'CPU s':>8s}"
        f"{'/ PEFT LoRA':>12s}{'/ PEFT DoRA':>12s}{'/ DeepSpeed':>12s}"
        f"{'peak MB':>9s}{'received MB':>12s}{'norm MB':>9s}{'norm %':>8s}{'score %':>8s}"
        f"{'trained M':>11s}{'optimizer MB':>13s}"
    )
    lines = [head]
    for variant, e in report["variants"].items():
        ratios = "".join(f"{e['ratios'][n]:12.3f}" if n in e["ratios"] else f"{'':12s}" for n in REFERENCES)
        peak = e["peak_device_bytes"] or e["peak_rss_bytes"]
        lines.append(
            f"{VARIANTS[variant]:25s}{e['median_seconds']:9.3f}{e['min_seconds']:8.3f}{e['iqr_seconds']:7.3f}{e['median_cpu_seconds']:8.3f}{ratios}"
            f"{peak / 1e6:9.0f}{e['received_bytes'] / 1e6:12.1f}{e['norm_refresh_bytes'] / 1e6:9.2f}"
            f"{100 * e['norm_refresh_share']:8.2f}{100 * e['scoring_share']:8.2f}"
            f"{e['trainable'] / 1e6:11.3f}{e['optimizer_bytes'] / 1e6:13.2f}"
        )
    return "\n".join(lines)


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the median step with its quartiles, and of peak memory a rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = report["variants"]
    names = [VARIANTS[variant] for variant in entries]
    colours = ["tab:blue" if "this project" in n else "tab:gray" if "no" in n else "tab:orange" for n in names]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained", sharey=True)
    medians = [e["median_seconds"] for e in entries.values()]
    bars = left.barh(names, medians, xerr=[e["iqr_seconds"] / 2 for e in entries.values()], color=colours)
    left.bar_label(bars, fmt="%.2f", padding=3)
    left.set_xlabel("seconds a step (median, IQR)")
    peaks = [(e["peak_device_bytes"] or e["peak_rss_bytes"]) / 1e9 for e in entries.values()]
    right.bar_label(right.barh(names, peaks, color=colours), fmt="%.2f", padding=3)
    right.set_xlabel("peak memory a rank, GB")
    left.invert_yaxis()
    for axis in (left, right):
        axis.margins(x=0.15)
    s = report["settings"]
    picture = "a picture and " if s["pictures"] else ""
    figure.suptitle(
        f"{s['ranks']} ranks, ZeRO-3, width {s['hidden']}, ffn {s['ffn']}, {s['layers']} layers, "
        f"{picture}{s['tokens']} tokens a rank, r={s['r']}, bf16",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
