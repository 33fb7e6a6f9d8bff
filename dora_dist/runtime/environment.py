"""What a run would find here: ranks, devices, memory, versions, and the speed of collectives between the ranks."""

import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dora_dist.runtime import agreement, distributed, launchers
from dora_dist.runtime.distributed import World
from dora_dist.runtime.watch import Watch

MESSAGE_BYTES = (1 << 16, 1 << 20, 1 << 24, 1 << 26)
_REPEATS = 5
_LONG_ENOUGH_S = 2.0  # a size that takes longer is the last one


def survey(timeout_s: float) -> dict[str, Any] | None:
    """Start the ranks and ask each what it found (collective); rank 0 gets the result, plain data, others None.

    {"launcher", "world_size", "meeting_point", "backend", "ranks": [...], "collectives": [...], "warnings": [...]};
    collectives' bandwidth is what a link carries, independent of the number of ranks. Raises UserError when ranks do
    not find one another within `timeout_s` seconds.
    """
    distributed.choose_accelerator("auto")
    distributed.leave_nccl_errors_to_the_watch()
    world = distributed.start(timeout_s)
    with Watch(world, timeout_s):
        ranks: list[dict[str, Any]] = [{}] * world.world_size
        dist.all_gather_object(ranks, _this_rank(world))
        collectives = measure(world)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    backend = dist.get_backend()
    distributed.stop()
    if not world.first:
        return None
    odd = warnings(ranks)
    for rank in ranks:
        del rank["code"]  # files by the dozen: only differences matter
    return {
        "launcher": world.launcher,
        "world_size": world.world_size,
        "meeting_point": place,
        "backend": backend,
        "ranks": ranks,
        "collectives": collectives,
        "warnings": odd,
    }


def measure(world: World) -> list[dict[str, Any]]:
    """Time all-reduce and all-gather of growing messages (collective): the median of the slowest rank's seconds.

    Bandwidths are those of a bus: (n - 1) / n of the bytes cross it in an all-gather to n ranks, twice that in an
    all-reduce. Nothing to measure on one rank.
    """
    if world.world_size == 1:
        return []
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    share = (world.world_size - 1) / world.world_size
    found = []
    for operation, crossing in (("all-reduce", 2 * share), ("all-gather", share)):
        for size in MESSAGE_BYTES:
            numbers = size // 4 // world.world_size * world.world_size
            whole = torch.zeros(numbers, device=device)
            part = whole[: numbers // world.world_size].clone()
            if operation == "all-reduce":
                seconds = _median_seconds(partial(dist.all_reduce, whole), device)
            else:
                seconds = _median_seconds(partial(dist.all_gather_into_tensor, whole, part), device)
            bandwidth = 4 * numbers * crossing / seconds / 1e9
            found.append({"operation": operation, "bytes": 4 * numbers, "seconds": seconds, "bus_gb_per_s": bandwidth})
            if seconds > _LONG_ENOUGH_S:
                break
    return found


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    from deepspeed.accelerator import get_accelerator

    taken = torch.zeros(_REPEATS + 1, device=device)
    for i in range(_REPEATS + 1):
        dist.barrier()
        get_accelerator().synchronize()
        since = time.perf_counter()
        run()
        get_accelerator().synchronize()
        taken[i] = time.perf_counter() - since
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)  # the slowest rank's, so all ranks know the same
    return statistics.median(taken[1:].tolist())  # the first one connects


def _this_rank(world: World) -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name, on_cpu = accelerator.device_name(), accelerator.device_name() == "cpu"
    index = int(os.environ["LOCAL_RANK"])
    address = ""
    with suppress(OSError):
        address = launchers.source_address(os.environ["MASTER_ADDR"])
    found = {
        "rank": world.rank,
        "local_rank": world.local_rank,
        "local_world_size": world.local_world_size,
        "host": world.host,
        "address": address,
        "accelerator": name,
        "device": _cpu_name() if on_cpu else str(torch.get_device_module(name).get_device_name(index)),
        "devices_here": 1 if on_cpu else accelerator.device_count(),
        "device_memory_bytes": None if on_cpu else int(accelerator.total_memory(index)),
        "host_memory_bytes": psutil.virtual_memory().total,
        "host_cpus": os.cpu_count() or 1,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": agreement.versions(),
        "code": agreement.of_code(),
        "notes": _notes(world),
    }
    if dist.get_backend() == "nccl":
        found["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _notes(world: World) -> list[str]:
    """What is odd and only the rank itself can see."""
    found = []
    if torch.version.cuda is not None and not torch.cuda.is_available():
        found.append(f"torch is built for CUDA {torch.version.cuda} but finds no GPU")
    if world.launcher == "none" and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        found.append("in a Slurm job of several tasks, but without srun this is one process: srun dora-dist env")
    return found


def warnings(ranks: Sequence[dict[str, Any]]) -> list[str]:
    """What is odd about these ranks, in words, from what each said of itself."""
    hosts = [rank["host"] for rank in ranks]
    found = agreement.differences([(r["host"], {**r["versions"], **r["code"], "device": r["device"]}) for r in ranks])
    notes: dict[str, list[int]] = {}
    for rank in ranks:
        for note in rank["notes"]:
            notes.setdefault(note, []).append(rank["rank"])
    found += [f"{agreement.where(where, hosts)}: {note}" for note, where in notes.items()]
    counts = Counter(hosts)
    if len(set(counts.values())) > 1:
        found.append("hosts run different numbers of ranks: " + ", ".join(f"{h} {n}" for h, n in counts.items()))
    for host, count in counts.items():
        here = [rank for rank in ranks if rank["host"] == host]
        if len({rank["local_rank"] for rank in here}) < count:
            found.append(f"several ranks on {host} have the same local rank: is it two machines of one name?")
        if here[0]["devices_here"] > count and here[0]["accelerator"] != "cpu":
            found.append(f"{host} has {here[0]['devices_here']} devices but {count} ranks: start one rank per device")
        idle = [r["rank"] for r in here if r["accelerator"] == "cpu" and 2 * r["threads"] * count <= r["cpus"]]
        if idle:
            found.append(
                f"{agreement.where(idle, hosts)} compute with {here[0]['threads']} of {here[0]['cpus']} CPUs: set "
                "OMP_NUM_THREADS (torchrun makes it 1)"
            )
        narrow = [rank["rank"] for rank in here if rank["cpus"] == 1 and rank["host_cpus"] >= 4 * count]
        if narrow:
            found.append(
                f"{agreement.where(narrow, hosts)} may use 1 of {here[0]['host_cpus']} CPUs: mpirun --bind-to none, "
                "srun --cpus-per-task"
            )
    return found


def as_table(found: dict[str, Any]) -> str:
    """`survey`'s result for people; ranks that found the same share a line."""
    ranks = found["ranks"]
    hosts = [rank["host"] for rank in ranks]
    addresses = dict.fromkeys(f"{rank['host']} {rank['address']}".strip() for rank in ranks)
    shown = ", ".join(list(addresses)[:8]) + (f" and {len(addresses) - 8} more" if len(addresses) > 8 else "")
    versions = ", ".join(f"{name} {value}" for name, value in ranks[0]["versions"].items())
    size, several = found["world_size"], "s" if found["world_size"] > 1 else ""
    lines = [
        f"launcher    {found['launcher']}: {size} rank{several}, backend {found['backend']}, met at "
        f"{found['meeting_point']}",
        f"hosts       {shown}",
        f"versions    {versions}",
    ]
    alike: dict[str, list[int]] = {}
    for rank in ranks:
        alike.setdefault(_hardware(rank), []).append(rank["rank"])
    lines += [f"{agreement.where(same, hosts)}: {hardware}" for hardware, same in alike.items()]
    if found["collectives"]:
        lines += ["", *_bandwidths(found["collectives"])]
    return "\n".join(lines + [f"warning: {warning}" for warning in found["warnings"]])


def _hardware(rank: dict[str, Any]) -> str:
    memory = f", {rank['device_memory_bytes'] / 1e9:.1f} GB" if rank["device_memory_bytes"] else ""
    return (
        f"{rank['accelerator']} ({rank['device']}{memory}); {rank['cpus']} of the host's {rank['host_cpus']} CPUs, "
        f"{rank['threads']} thread{'s' if rank['threads'] > 1 else ''}; host memory "
        f"{rank['host_memory_bytes'] / 1e9:.1f} GB"
    )


def _bandwidths(collectives: Sequence[dict[str, Any]]) -> list[str]:
    sizes = list(dict.fromkeys(one["bytes"] for one in collectives))
    lines = ["message     " + "".join(f"{_bytes(size):>14}" for size in sizes)]
    for operation in dict.fromkeys(one["operation"] for one in collectives):
        cells = {one["bytes"]: one for one in collectives if one["operation"] == operation}
        rates = "".join(f"{cells[s]['bus_gb_per_s']:>9.3f} GB/s" if s in cells else " " * 14 for s in sizes)
        times = "".join(f"{cells[s]['seconds'] * 1e3:>11.2f} ms" if s in cells else " " * 14 for s in sizes)
        lines += [f"{operation:<12}{rates}", " " * 12 + times]
    return lines


def _bytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 * 0.99 else f"{size / 2**10:.0f} KiB"


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
