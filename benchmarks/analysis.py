"""How magnitudes and directions move under full fine-tuning, LoRA and DoRA: real model, real text, several seeds.

The question of Liu et al., section 3, asked of SmolLM2-135M and the quickstart's texts. Each run records at four steps
how far its weights have moved. The table has the correlation of ΔD and ΔM over layers and recordings, as the mean over
seeds and its range: for query and value matrices, for both together, and for all seven matrices of a layer. Finished
runs are kept and not repeated; one that was interrupted starts again. `--help` lists the flags.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))  # what the demos have in common

from package_archives import fetch_package
from quickstart import MEMBERS, TEXTS, build_data
from stages import LANGUAGE_MODEL, import_language_model, run, set_environment

from dora_dist.runtime.errors import UserError

CONFIG, RECORDINGS, EVERY = "configs/quickstart.json", 4, r".*_proj"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": (
        "full fine-tuning",
        {"method": "full", "target_modules": None, "r": None},
    ),
    "lora": ("LoRA", {"weight_decomposed": False}),
    "dora": ("DoRA", {"weight_decomposed": True}),
}
"""Titles, and the fields of the adapter section that differ from the quickstart's."""


def main(options: argparse.Namespace) -> None:
    set_environment()
    output: Path = options.output
    base, data = output / "base", output / "data" / options.task
    if not (data / "train.jsonl").exists():
        model, texts = (fetch_package(*package, options.packages) for package in (LANGUAGE_MODEL, TEXTS))
        import_language_model(model, base)
        build_data(texts, data, [options.task])
    titled = [
        (METHODS[method][0], train(method, seed, options, base=base, texts=data / "train.jsonl"))
        for seed in options.seeds
        for method in options.methods
    ]
    words = [f"{title}={folder}" for title, folder in titled]
    run("dora-dist", "analyze", *words, "--overwrite", "--output", output / "analysis.png")
    run("dora-dist", "analyze", *words, "--modules", EVERY, "--overwrite", "--output", output / "every.png")
    panels, every = (json.loads((output / f"{name}.json").read_text())["panels"] for name in ("analysis", "every"))
    table = summary(panels, every)
    (output / "analysis.md").write_text(table)
    print(table)


def train(method: str, seed: int, options: argparse.Namespace, *, base: Path, texts: Path) -> Path:
    """One run, unless it is there already; returns its folder, of which the recordings are kept and no checkpoint."""
    rate = getattr(options, f"{method}_rate")
    folder: Path = (
        options.output / "runs" / f"{options.task}-{method}-{rate:g}-{options.steps}x{options.batch}-seed{seed}"
    )
    finished = folder.with_name(f"{folder.name}.finished")
    if finished.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    fields = {
        "model.path": base,
        "data.train": texts,
        "training.learning_rate": rate,
        "training.max_steps": options.steps,
        "training.global_batch_size": options.batch,
        "training.warmup_steps": options.steps // 10,
        "training.seed": seed,
        "analysis.every": options.steps // RECORDINGS,
        "checkpoint.run_dir": folder,
        **{f"adapter.{name}": value for name, value in METHODS[method][1].items()},
    }
    words = {
        name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in fields.items()
    }
    run("dora-dist", "train", "--config", CONFIG, *(f"--{name}={word.strip(chr(34))}" for name, word in words.items()))
    for checkpoint in folder.glob("checkpoint-*"):  # of full fine-tuning 12 bytes a parameter
        shutil.rmtree(checkpoint)
    finished.touch()
    return folder


def summary(panels: list[dict[str, Any]], every: list[dict[str, Any]]) -> str:
    """A Markdown table: a row per method, and the mean correlation over seeds with its range for each kind."""
    lines = ["| correlation of ΔD and ΔM | query | value | both | all matrices |", "|---|---|---|---|---|"]
    for panel, whole in zip(panels, every, strict=True):
        found = [*(_by_seed(panel, kind) for kind in ("query", "value", "all")), _by_seed(whole, EVERY)]
        lines.append(f"| {panel['title']} | {' | '.join(map(_cell, found))} |")
    return "\n".join(lines) + "\n"


def _by_seed(panel: dict[str, Any], kind: str) -> list[float]:
    runs = panel.get("by_run", {"": panel["correlations"]})
    found = (correlations[kind] for correlations in runs.values())
    return [value for value in found if value is not None]


def _cell(values: list[float]) -> str:
    if not values:  # nothing varies where nothing has trained
        return "undefined"
    return f"{statistics.mean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", choices=MEMBERS, default="socialiqa", help="the quickstart's texts (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps, a multiple of 4 (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="texts a step (%(default)s)")
    parser.add_argument("--full-rate", type=float, default=5e-5, help="learning rate of full fine-tuning (%(default)s)")
    for method in ("lora", "dora"):
        parser.add_argument(f"--{method}-rate", type=float, default=5e-4, help="learning rate (%(default)s)")
    parser.add_argument("--packages", type=Path, default=Path("runs/quickstart/cache"), help="folder for downloads")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-analysis"), help="runs, figure and table")
    found = parser.parse_args()
    if found.steps % RECORDINGS:
        parser.error(f"--steps {found.steps}: is not a multiple of {RECORDINGS}")
    return found


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        sys.exit(f"error: {error}")
