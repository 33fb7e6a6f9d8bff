"""`dora-dist env`: what it says of ranks that differ. On real ranks: tests/launch."""

from typing import Any

import pytest
import torch

from dora_dist.runtime import environment
from dora_dist.runtime.distributed import choose_accelerator
from dora_dist.runtime.errors import UserError


def rank(number: int, host: str = "n0", **changes: Any) -> dict[str, Any]:
    found = {
        "rank": number,
        "local_rank": number,
        "local_world_size": 2,
        "host": host,
        "address": "10.0.0.1",
        "accelerator": "cuda",
        "device": "NVIDIA H100 80GB HBM3",
        "devices_here": 2,
        "device_memory_bytes": 80 * 10**9,
        "host_memory_bytes": 512 * 10**9,
        "host_cpus": 64,
        "cpus": 32,
        "threads": 32,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "code": {"dora_dist/cli.py": "sha256 1"},
        "notes": [],
    }
    return found | changes


def test_nothing_to_say_of_ranks_that_are_the_same() -> None:
    assert environment.warnings([rank(0), rank(1), rank(2, "n1", local_rank=0), rank(3, "n1", local_rank=1)]) == []


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (
            [rank(0), rank(1, versions={"python": "3.11.7", "torch": "2.12.1"})],
            "torch: 2.13.0 on rank 0 (n0); 2.12.1 on rank 1 (n0)",
        ),
        (
            [rank(0), rank(1, device="NVIDIA A100")],
            "device: NVIDIA H100 80GB HBM3 on rank 0 (n0); NVIDIA A100 on rank 1",
        ),
        (
            [rank(0), rank(1, code={"dora_dist/cli.py": "sha256 2"})],
            "dora_dist/cli.py: sha256 1 on rank 0 (n0); sha256 2",
        ),
        ([rank(0), rank(1), rank(2, "n1", local_rank=0, devices_here=1)], "different numbers of ranks: n0 2, n1 1"),
        ([rank(0), rank(1, local_rank=0)], "several ranks on n0 have the same local rank"),
        ([rank(0, devices_here=8), rank(1, devices_here=8)], "n0 has 8 devices but 2 ranks"),
        ([rank(0, cpus=1), rank(1, cpus=1)], "ranks 0-1 (n0) may use 1 of 64 CPUs: mpirun --bind-to none"),
        (
            [rank(0, accelerator="cpu", threads=1), rank(1)],
            "rank 0 (n0) compute with 1 of 32 CPUs: set OMP_NUM_THREADS",
        ),
        ([rank(0), rank(1, notes=["finds no GPU"])], "rank 1 (n0): finds no GPU"),
    ],
)
def test_what_is_odd_is_said(ranks: list[dict[str, Any]], says: str) -> None:
    found = environment.warnings(ranks)
    assert len(found) == 1 and says in found[0], found


def test_the_table_folds_ranks_that_found_the_same() -> None:
    ranks = [rank(0), rank(1), rank(2, "n1", local_rank=0), rank(3, "n1", local_rank=1, device="NVIDIA A100")]
    collectives = [
        {"operation": operation, "bytes": size, "seconds": size / 2**30, "bus_gb_per_s": 1.5}
        for operation in ("all-reduce", "all-gather")
        for size in environment.MESSAGE_BYTES[:2]
    ]
    found = {
        "launcher": "srun",
        "world_size": 4,
        "meeting_point": "n0:15061",
        "backend": "nccl",
        "ranks": ranks,
        "collectives": collectives,
        "warnings": ["look here"],
    }
    text = environment.as_table(found)
    assert "srun: 4 ranks, backend nccl, met at n0:15061" in text
    assert "ranks 0-1 (n0), 2 (n1): cuda (NVIDIA H100 80GB HBM3, 80.0 GB); 32 of the host's 64 CPUs" in text
    assert "rank 3 (n1): cuda (NVIDIA A100" in text
    assert text.count("GB/s") == 4 and "0.98 ms" in text and "64 KiB" in text and "1 MiB" in text
    assert text.endswith("warning: look here")


def test_a_gpu_that_is_asked_for_and_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # so that it holds on a machine with one, too
    with pytest.raises(UserError, match=r'engine.accelerator = "cuda": torch finds no GPU here .*set it to "auto"'):
        choose_accelerator("cuda")
