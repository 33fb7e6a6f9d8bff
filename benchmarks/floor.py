"""The least that a training step can take here: its gathers and products, counted and measured; see `--help`.

A step gathers every adapted weight in forward and in backward, and multiplies by it each time; with activation
checkpointing that keeps no outputs, also in the recomputation between them. Here the gathers and the products of one
layer are timed by themselves, on all ranks at once, and multiplied by their number.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import start_method
from stepbench.measure import device_description, join, quiet
from stepbench.settings import Settings, default_ranks
from torch import nn

from dora_dist.adapters import storage

SIZES = ("hidden", "ffn", "layers", "tokens", "ranks")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Counts a step's gathered bytes and products, measures the rate of each, and prints the seconds "
        "that they take, for each storage of the base weights"
    )
    for name in SIZES:
        default = default_ranks() if name == "ranks" else getattr(Settings(), name)
        parser.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement (%(default)s)")
    parser.add_argument("--step", type=Path, help="a step.json of benchmarks/step.py, whose steps are printed beside")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-floor"), help="folder for the JSON")
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error(f"--ranks {options.ranks}: one rank gathers nothing; give 2 or more")
    settings = Settings(**{name: getattr(options, name) for name in SIZES})
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        arguments = (settings, options.repeats, Path(folder))
        torch.multiprocessing.start_processes(rank_main, arguments, settings.ranks, start_method=start_method())
        measured = json.loads((Path(folder) / "result.json").read_text())
    report = {"settings": asdict(settings), **measured, "floors": floors(measured, settings)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "floor.json").write_text(json.dumps(report, indent=1))
    print(table(report))
    if options.step:
        for name, entry in json.loads(options.step.read_text())["variants"].items():
            print(f"measured, {name}: {entry['median_seconds']:.3f} s")
    print(f"written: {options.output / 'floor.json'}")


def shapes(settings: Settings) -> dict[tuple[int, int], int]:
    """How many weights of each shape (out, in) a layer has."""
    wide, high = (settings.ffn, settings.hidden), (settings.hidden, settings.ffn)
    return {(settings.hidden, settings.hidden): 4, wide: 2, high: 1}


def rank_main(rank: int, settings: Settings, repeats: int, folder: Path) -> None:
    """Measure as one of several ranks; rank 0 writes `folder`/result.json."""
    quiet()
    join(rank, settings.ranks, folder)
    rate = gather_rate(settings, repeats)
    products = {name: _products(name, settings, repeats) for name in storage.names()}
    if rank == 0:
        result = {"device": device_description(), "gather_bytes_per_second": rate, "storages": products}
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def gather_rate(settings: Settings, repeats: int) -> float:
    """Bytes a second that this rank receives while the largest weight is gathered as in training. Collective."""
    from dora_dist.weights.placement import in_place
    from dora_dist.zero3.placement import ShardedPlacement

    def fill(start: int, stop: int, out: torch.Tensor) -> None:
        out.fill_(1.0)

    weight = nn.Parameter(torch.empty(settings.ffn, settings.hidden, dtype=torch.bfloat16), requires_grad=False)
    placement = ShardedPlacement(settings.deepspeed_config())
    [placed] = placement.place([weight], weight.numel(), in_place(fill))

    def gather() -> None:
        placed.all_gather_coalesced([placed]).wait()
        placed.partition()

    received = weight.numel() * weight.element_size() * (settings.ranks - 1) / settings.ranks
    return received / _seconds(gather, repeats)


def _products(name: str, settings: Settings, repeats: int) -> dict[str, float]:
    """Of one layer on a storage: its bytes, and seconds of its products with activations, forward and backward."""
    from deepspeed.accelerator import get_accelerator

    device, how = get_accelerator().current_device_name(), storage.storage_of(name)
    total = {"bytes": 0.0, "forward_seconds": 0.0, "backward_seconds": 0.0}
    for (out, into), count in shapes(settings).items():
        weight = nn.Parameter(torch.randn(out, into).mul_(0.02).to(torch.bfloat16), requires_grad=False)
        held = [tensor.detach().to(device) for tensor in how.hold(weight).values()]
        x = torch.randn(settings.tokens, into, dtype=torch.bfloat16, device=device)
        grad = torch.randn(settings.tokens, out, dtype=torch.bfloat16, device=device)

        def forward(x: torch.Tensor = x, held: Any = held, shape: tuple[int, int] = (out, into)) -> None:
            how.project(x, held, shape)

        def backward(grad: torch.Tensor = grad, held: Any = held, shape: tuple[int, int] = (out, into)) -> None:
            how.project_back(grad, held, shape)

        total["bytes"] += count * sum(tensor.numel() * tensor.element_size() for tensor in held)
        total["forward_seconds"] += count * _seconds(forward, repeats)
        total["backward_seconds"] += count * _seconds(backward, repeats)
    return total


def _seconds(work: Callable[[], None], repeats: int) -> float:
    """The median time of `work` between barriers: all ranks work at once, as in a step. Once before, unmeasured."""
    from deepspeed.accelerator import get_accelerator

    times = []
    for _ in range(repeats + 1):
        get_accelerator().synchronize()
        dist.barrier()
        started = time.perf_counter()
        work()
        get_accelerator().synchronize()
        dist.barrier()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def floors(measured: dict[str, Any], settings: Settings) -> dict[str, dict[str, float]]:
    """By storage and passes: what a step gathers and how long that and its products take, with and without overlap."""
    share = (settings.ranks - 1) / settings.ranks
    result = {}
    for forwards, (name, layer) in itertools.product((2, 1), measured["storages"].items()):
        received = settings.layers * (forwards + 1) * share * layer["bytes"]
        gathers = received / measured["gather_bytes_per_second"]
        products = settings.layers * (forwards * layer["forward_seconds"] + layer["backward_seconds"])
        result[f"{name}, {forwards + 1} passes"] = {
            "received_bytes": received,
            "gather_seconds": gathers,
            "product_seconds": products,
            "floor_seconds": gathers + products,
            "overlapped_seconds": max(gathers, products),
        }
    return result


def table(report: dict[str, Any]) -> str:
    """Plain text, one line for each storage."""
    s = Settings(**report["settings"])
    weights = s.layers * sum(count * out * into for (out, into), count in shapes(s).items())
    lines = [
        f"{s.ranks} ranks on {report['device']}: gathers at {report['gather_bytes_per_second'] / 1e9:.2f} GB/s; "
        f"a pass is a product of {s.tokens} tokens with {weights / 1e6:.0f} M weights, "
        f"{2e-12 * s.tokens * weights:.2f} TFLOP a rank; 3 passes with checkpointing, 2 where it keeps outputs",
        f"{'storage':18s}{'received MB':>13s}{'gathers s':>11s}{'products s':>12s}{'floor s':>9s}{'overlapped s':>14s}",
    ]
    for name, e in report["floors"].items():
        seconds = f"{e['gather_seconds']:11.3f}{e['product_seconds']:12.3f}{e['floor_seconds']:9.3f}"
        lines.append(f"{name:18s}{e['received_bytes'] / 1e6:13.1f}{seconds}{e['overlapped_seconds']:14.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
