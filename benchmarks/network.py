"""One training step over a slow wire: two ranks in two network namespaces of this machine; see `--help`.

Needs Linux and root. Namespaces and interfaces are taken down however it ends.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from step import start_method
from stepbench.measure import device_description, rank_main
from stepbench.models import write_base
from stepbench.settings import Settings
from stepbench.wire import Wire, missing, wire
from tqdm import tqdm

from dora_dist.adapters import storage
from dora_dist.runtime import distributed

REFERENCES = ("PEFT LoRA", "ours, plain")
SIZES = ("hidden", "ffn", "layers", "heads", "vocab", "tokens", "r", "rounds", "warmup", "steps")


def main() -> None:
    options, settings = parse()
    if reasons := missing():
        sys.exit("benchmarks/network.py cannot run here: " + "; ".join(reasons))
    distributed.choose_accelerator("cpu")
    variants = chosen(options.only, settings)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        base = options.base or Path(temporary) / "base"
        if not (base / "model.safetensors").exists():
            base.mkdir(parents=True, exist_ok=True)
            write_base(base, settings)
        results = {}
        for rate in options.gigabits:
            with wire(rate) as ends:
                results[rate] = measure_all(variants, base, rate, ends)
    report = {"settings": settings.as_dict(), "device": device_description(), "rates": summary(results)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "network.json").write_text(json.dumps(report, indent=1))
    print(table(report["rates"]))
    print(f"written: {options.output / 'network.json'}")


def parse() -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description="Seconds and received bytes of a training step of two ranks that are joined by a slow wire: no "
        "adapter, PEFT's LoRA, and this project's DoRA on each storage of the base weights"
    )
    parser.add_argument("--gigabits", type=float, nargs="+", default=[1.0, 10.0], help="rates of the wire, Gbit/s")
    sizes = {f.name: f.default for f in fields(Settings) if type(f.default) is int and f.name in SIZES}
    for name, default in {**sizes, "warmup": 1, "steps": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    parser.add_argument("--engine", type=json.loads, default={}, help="DeepSpeed JSON, merged last, for all variants")
    known = list(_variants(Settings()))
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="VARIANT", help=", ".join(known))
    parser.add_argument("--base", type=Path, help="keep the synthetic base model in this folder, or reuse it")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-network"), help="folder for the JSON")
    options = parser.parse_args()
    taken = {name: getattr(options, name) for name in (*SIZES, "engine")}
    return options, Settings(**taken, ranks=2)


def _variants(settings: Settings) -> dict[str, tuple[str, Settings]]:
    """Every variant by the name it has in tables; those of storages come from the registry."""
    ours = {f"ours, {name}": replace(settings, storage=name) for name in storage.names()}
    ours |= {f"{name}, selective": replace(changed, selective=True) for name, changed in ours.items()}
    own = {name: ("dora", changed) for name, changed in ours.items()}
    return {"no adapter": ("none", settings), "PEFT LoRA": ("peft-lora", settings), **own}


def chosen(names: list[str], settings: Settings) -> dict[str, tuple[str, Settings]]:
    return {name: variant for name, variant in _variants(settings).items() if name in names}


def measure_all(
    variants: dict[str, tuple[str, Settings]], base: Path, rate: float, ends: Wire
) -> dict[str, list[list[dict[str, Any]]]]:
    """results[variant][round][rank]; variants take turns in each round, which begins with another one."""
    results: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in variants}
    names = list(variants)
    rounds = next(iter(variants.values()))[1].rounds
    with tqdm(total=rounds * len(names), unit="run", file=sys.stderr) as bar:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                bar.set_description(f"{rate:g} Gbit/s, round {turn + 1}: {name}")
                results[name].append(launch(*variants[name], base, ends))
                bar.update()
    return results


def launch(variant: str, settings: Settings, base: Path, ends: Wire) -> list[dict[str, Any]]:
    """Fresh ranks for one variant, one at each end of the wire; each rank's measurements."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        arguments = (ends, variant, base, settings, Path(folder))
        torch.multiprocessing.start_processes(end_main, arguments, 2, start_method=start_method())
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]


def end_main(rank: int, ends: Wire, variant: str, base: Path, settings: Settings, folder: Path) -> None:
    """One rank, at its end of the wire."""
    ends.enter(rank)
    rank_main(rank, variant, base, settings, folder, False)


def summary(results: dict[float, dict[str, list[list[dict[str, Any]]]]]) -> dict[str, Any]:
    """By rate and variant: the median step, its ratio to others, and what the interface received of a step."""
    report: dict[str, Any] = {}
    for rate, variants in results.items():
        entries = report[f"{rate:g}"] = {name: _entry(rounds) for name, rounds in variants.items()}
        for entry in entries.values():
            for other in (name for name in REFERENCES if name in entries):
                entry["seconds_ratio"][other] = entry["median_seconds"] / entries[other]["median_seconds"]
                entry["bytes_ratio"][other] = entry["wire_bytes"] / entries[other]["wire_bytes"]
    return report


def _entry(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    seconds = [s for ranks in rounds for s in ranks[0]["seconds"]]
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "round_median_seconds": [statistics.median(ranks[0]["seconds"]) for ranks in rounds],
        "wire_bytes": statistics.median(rank["wire_bytes"] for ranks in rounds for rank in ranks),
        "peak_rss_bytes": max(rank["peak_rss_bytes"] for ranks in rounds for rank in ranks),
        "losses": rounds[0][0]["losses"],
        "seconds_ratio": {},
        "bytes_ratio": {},
    }


def table(rates: dict[str, Any]) -> str:
    """Plain text, one line for each variant at each rate."""
    others = [name for name in REFERENCES if all(name in entries for entries in rates.values())]
    heads = "".join(f"{f'/ {name}':>14s}" for name in others)
    lines = [f"{'Gbit/s':>7s}  {'variant':24s}{'median s':>9s}{heads}{'received MB':>13s}{heads}{'peak MB':>9s}"]
    for rate, line in _lines(rates, others):
        lines.append(f"{rate:>7s}  {line}")
    return "\n".join(lines)


def _lines(rates: dict[str, Any], others: list[str]) -> Iterator[tuple[str, str]]:
    for rate, entries in rates.items():
        for name, e in entries.items():
            seconds = "".join(f"{e['seconds_ratio'][other]:14.3f}" for other in others)
            sent = "".join(f"{e['bytes_ratio'][other]:14.3f}" for other in others)
            numbers = f"{e['median_seconds']:9.3f}{seconds}{e['wire_bytes'] / 1e6:13.1f}{sent}"
            yield rate, f"{name:24s}{numbers}{e['peak_rss_bytes'] / 1e6:9.0f}"


if __name__ == "__main__":
    main()
