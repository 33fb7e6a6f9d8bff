"""Seconds, memory and bytes of one training step: this project, PEFT and plain DeepSpeed, in one run; see `--help`.

Every round starts fresh ranks for each variant in turn, so that what else the machine does falls on all of them.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from stepbench.measure import rank_main
from stepbench.models import write_base
from stepbench.report import summary, table, write_plot
from stepbench.settings import DORA, VARIANTS, Settings, parse, resolved
from tqdm import tqdm


def main() -> None:
    settings, options = parse()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        base = options.base or Path(temporary) / "base"
        if not (base / "model.safetensors").exists():
            base.mkdir(parents=True, exist_ok=True)
            write_base(base, settings)
        if options.profile:
            launch(options.profile, base, settings, profile=True)
            return
        results = measure_all(options.variants, base, settings)
    report = summary(results, settings)
    check_first_losses(report)
    check_sizes(report)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "step.json").write_text(json.dumps(report, indent=1))
    write_plot(report, options.output / "step.png")
    print(table(report))
    print(f"written: {options.output / 'step.json'}, {options.output / 'step.png'}")


def measure_all(variants: list[str], base: Path, settings: Settings) -> dict[str, list[list[dict[str, Any]]]]:
    """results[variant][round][rank]; each round begins with another variant."""
    results: dict[str, list[list[dict[str, Any]]]] = {variant: [] for variant in variants}
    with tqdm(total=settings.rounds * len(variants), unit="run", file=sys.stderr) as bar:
        for turn in range(settings.rounds):
            first = turn % len(variants)
            for variant in variants[first:] + variants[:first]:
                bar.set_description(f"round {turn + 1}: {VARIANTS[variant]}")
                results[variant].append(launch(variant, base, settings))
                bar.write(
                    f"{variant:10s} {statistics.median(results[variant][-1][0]['seconds']):8.3f} s",
                    sys.stderr,
                )
                bar.update()
    return results


def launch(variant: str, base: Path, settings: Settings, profile: bool = False) -> list[dict[str, Any]]:
    """Fresh ranks for one variant; each rank's measurements. A rank that fails ends them all with its traceback."""
    built, settings = resolved(variant, settings)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        arguments = (built, base, settings, Path(folder), profile)
        torch.multiprocessing.start_processes(rank_main, arguments, settings.ranks, start_method=start_method())
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(settings.ranks)]


def start_method() -> str:
    """How ranks begin: as new interpreters, or on a CPU as forks of a process that has imported what takes seconds.

    Libraries may ask for a GPU when they are imported, and a fork of a process that did cannot use it.
    """
    if torch.accelerator.is_available():
        return "spawn"
    multiprocessing.set_forkserver_preload(["torch", "transformers.trainer", "peft", "dora_dist.zero3.placement"])
    return "forkserver"


def check_first_losses(report: dict[str, Any]) -> None:
    """An adapter begins as the base model: before the first update all variants have one loss, to bf16's accuracy.

    Those on another storage have other base weights.
    """
    packed = {variant for variant, settings in DORA.items() if settings["storage"] != "plain"}
    first = {variant: entry["first_loss"] for variant, entry in report["variants"].items() if variant not in packed}
    if max(first.values()) - min(first.values()) > 2**-8 * max(first.values()):
        raise SystemExit(f"the variants do not compute the same model: first losses {first}")


def check_sizes(report: dict[str, Any]) -> None:
    """The same adapter has as many numbers to train here as in PEFT, and a whole model as many as in DeepSpeed."""
    trainable = {variant: entry["trainable"] for variant, entry in report["variants"].items()}
    for ours, theirs in {"dora": "peft-dora", "lora": "peft-lora", "full": "deepspeed-full"}.items():
        if {ours, theirs} <= trainable.keys() and trainable[ours] != trainable[theirs]:
            raise SystemExit(f"the variants do not train the same parameters: {trainable}")


if __name__ == "__main__":
    main()
