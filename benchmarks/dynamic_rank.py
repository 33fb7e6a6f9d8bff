"""Dynamic rank against LoRA: real text, several seeds, the same steps. `--help` lists the flags.

Dynamic rank (Mao et al., ACL 2024) starts with 3/4 of plain LoRA's components and ends with half of them. Compared
with it: LoRA with half the components from the start, DoRA, and dynamic rank with magnitudes (the union of both
methods). Every method trains for the same steps on the same texts in the same order, by the recipes of configs/.
Learning rates are chosen on a validation split with a seed of its own; the table is of another split, after the last
step.

One process, or as many ranks as a launcher starts: `torchrun --nproc-per-node 2 benchmarks/dynamic_rank.py`.
"""

import argparse
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from rankbench.report import plot, summary, table
from rankbench.runs import METHODS, TASKS, Settings, run
from rankbench.texts import encoder, rated_snippets

from dora_dist.runtime import distributed
from dora_dist.runtime.folders import write_json

SWEEP_SEED = 0


def main() -> None:
    options, dynamic_options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    distributed.choose_accelerator("auto")
    world = distributed.start()
    settings = Settings(options.output, options.r, options.epochs, options.batch, options.limit, tuple(dynamic_options))
    with distributed.together("fetching models and texts"):
        if world.first:
            for task in options.tasks:
                prepare(task, settings, options.packages)
    report = {
        "settings": {name: value for name, value in vars(options).items() if name not in ("output", "packages")},
        "dynamic_options": dynamic_options,
        "versions": {"python": platform.python_version(), "torch": version("torch"), "deepspeed": version("deepspeed")},
        "tasks": {task: measure(task, settings, options) for task in options.tasks},
    }
    if world.first:
        write_json(options.output / "dynamic_rank.json", report)
        (options.output / "dynamic_rank.md").write_text(table(report))
        plot(report, options.output / "dynamic_rank.png")
        print(table(report))
        print(f"written: {options.output}/dynamic_rank.json, .md and .png")
    distributed.stop()


def prepare(task_name: str, settings: Settings, packages: Path) -> None:
    """A task's encoder and its three splits, which share no text, in the settings' folder."""
    task, folder = TASKS[task_name], settings.folder
    base = folder / "models" / task.encoder
    if not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        encoder(task.encoder, folder / "unpacked", packages).rename(base)
        shutil.rmtree(folder / "unpacked")
    records = {record["sentence"].lower().strip(): record for record in rated_snippets(packages)}
    clear = [{**r, "label": int(r["rating"] > 0)} for r in records.values() if abs(r["rating"]) > task.unclear]
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    start = 0
    for split, size in (("test", task.test), ("validation", task.validation), ("train", task.train)):
        (texts / f"{task_name}-{split}.json").write_text(json.dumps(clear[start : start + min(size, settings.limit)]))
        start += size


def measure(task: str, settings: Settings, options: argparse.Namespace) -> dict[str, object]:
    """Choose learning rates, then run every method with every seed. Collective."""
    tuned = list(dict.fromkeys(METHODS[name].tuned_as for name in options.methods))
    rates = options.rates if len(options.rates) > 1 else []  # of one there is nothing to choose
    sweep = {
        method: {rate: run(settings, task, method, rate, SWEEP_SEED, "validation")["metric"] for rate in rates}
        for method in tuned
    }
    best = {method: max(found or options.rates, key=found.get) for method, found in sweep.items()}
    results = {
        name: [run(settings, task, name, best[METHODS[name].tuned_as], seed, "test") for seed in options.seeds]
        for name in options.methods
    }
    return {"sweep": sweep, "learning_rates": best, "methods": summary(results, settings)}


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the options of dynamic-rank runs."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further options, --section.field VALUE as of `dora-dist train`, hold for the runs with dynamic rank.",
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3], help="learning rates")
    parser.add_argument("--r", type=int, default=8, help="components of plain LoRA in each layer (%(default)s)")
    parser.add_argument("--epochs", type=float, default=2, help="%(default)s")
    parser.add_argument("--batch", type=int, default=16, help="texts a step (%(default)s)")
    parser.add_argument("--limit", type=int, default=10**9, help="most texts of a split; the tables' size without it")
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="folder for downloads")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark-dynamic-rank"), help="results; finished runs are kept there"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
