"""What gathers cost this host, as ranks become many: a step's CPU time as rank 0 of pretended ranks; see `--help`.

The other ranks do not exist, and collectives return at once. Products and copies are the same for any number of ranks,
so what grows is what the host does for each rank: with our gathers nothing, with DeepSpeed's own most of the step.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from step import start_method
from stepbench.models import write_base
from stepbench.pretended import pretend_main
from stepbench.settings import Settings
from tqdm import tqdm

FORMS = ("ours", "DeepSpeed")


def main() -> None:
    options = parse()
    os.environ["DS_ACCELERATOR"] = "cpu"
    sizes = {name: getattr(options, name) for name in ("hidden", "ffn", "heads", "layers", "tokens", "warmup", "steps")}
    settings = Settings(**sizes, rounds=options.rounds)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        base = options.base or Path(temporary) / "base"
        if not (base / "model.safetensors").exists():
            base.mkdir(parents=True, exist_ok=True)
            write_base(base, settings)
        results = measure_all(options.worlds, base, settings)
    report = {"settings": asdict(settings), "worlds": summary(results)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gathers.json").write_text(json.dumps(report, indent=1))
    print(table(report["worlds"]))
    print(f"written: {options.output / 'gathers.json'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="CPU seconds and operations on tensors of one training step, as rank 0 of pretended ranks, with "
        "this project's gathers and with DeepSpeed's own"
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 64, 1024], help="numbers of ranks (%(default)s)")
    numbers = {"hidden": 1024, "ffn": 2752, "heads": 8, "layers": 4, "tokens": 16, "rounds": 3, "warmup": 3, "steps": 3}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    parser.add_argument("--base", type=Path, help="keep the synthetic base model in this folder, or reuse it")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-gathers"), help="folder for the JSON")
    return parser.parse_args()


def measure_all(worlds: list[int], base: Path, settings: Settings) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """results[world][form][round]; both forms take turns in each round."""
    results: dict[int, dict[str, list[dict[str, Any]]]] = {world: {form: [] for form in FORMS} for world in worlds}
    runs = [(w, form) for turn in range(settings.rounds) for w in worlds for form in FORMS[:: -1 if turn % 2 else 1]]
    for world, form in tqdm(runs, unit="run", file=sys.stderr):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            arguments = (form, base, replace(settings, ranks=world), Path(folder) / "result.json")
            torch.multiprocessing.start_processes(pretend_main, arguments, 1, start_method=start_method())
            results[world][form].append(json.loads(arguments[-1].read_text()))
    return results


def summary(results: dict[int, dict[str, list[dict[str, Any]]]]) -> dict[int, dict[str, dict[str, Any]]]:
    """Of each number of ranks and form: medians over all rounds, and what they are medians of."""
    return {
        world: {
            form: {
                "median_cpu_seconds": statistics.median(s for result in rounds for s in result["cpu_seconds"]),
                "cpu_seconds": [result["cpu_seconds"] for result in rounds],
                "operations": rounds[0]["operations"],
            }
            for form, rounds in forms.items()
        }
        for world, forms in results.items()
    }


def table(worlds: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Plain text, one line for each number of ranks."""
    lines = [
        f"{'ranks':>6s}" + "".join(f"{f'{form}, CPU s':>18s}{'operations':>12s}" for form in FORMS) + f"{'ratio':>8s}"
    ]
    for world, forms in worlds.items():
        cells = "".join(f"{forms[f]['median_cpu_seconds']:18.3f}{forms[f]['operations']:12d}" for f in FORMS)
        ours, theirs = (forms[form]["median_cpu_seconds"] for form in FORMS)
        lines.append(f"{world:6d}{cells}{ours / theirs:8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
