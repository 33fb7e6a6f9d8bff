"""The same run under every launcher, and what ranks say when they do not find one another or disagree.

srun and sbatch need a cluster: tests/cluster.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dora_dist.runtime.launchers import free_port
from tests import toy
from tests.distributed.training_runs import config, metrics
from tests.launch.test_launch import ROOT, type_in

TRAIN = ("launch/train.py", "--config")
ENV = ("-m", "dora_dist", "env", "--json")
ONE_HOST = ("deepspeed", "--quiet", "--hostfile", "one-host", "--no_ssh_check", "--master_addr", "127.0.0.1")
MPIRUN = ("mpirun", "--oversubscribe", "--bind-to", "none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("launchers")
    toy.base_model(folder / "base")
    toy.write_records(folder / "data.json", 25)
    (folder / "one-host").write_text("localhost slots=2\n")
    (folder / "two-hosts").write_text("n0 slots=1\nn1 slots=1\n")
    # Debian's MPICH has a library name of its own, which no program built elsewhere looks for.
    (folder / "mpich").mkdir()
    for library in Path("/usr/lib").glob("*/libmpich.so.12"):
        (folder / "mpich/libmpi.so.12").symlink_to(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
        patch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        yield folder


def write_run(folder: Path, name: str) -> Path:
    file = folder / f"{name}.json"
    once = {"save_every": None, "run_dir": str(folder / name), "keep_best": False}
    file.write_text(
        json.dumps(
            config(folder / "base", folder / "data.json", folder / name, training={"max_steps": 10}, checkpoint=once)
        )
    )
    return file


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, float]:
    done = type_in("deepspeed", "--num_accelerators", "2", *TRAIN, write_run(folder, "deepspeed"), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    losses: dict[int, float] = metrics(folder / "deepspeed")["losses"]
    assert list(losses) == list(range(1, 11)) and losses[10] < losses[1]
    return losses


def test_torchrun(folder: Path, expected: dict[int, float]) -> None:
    done = type_in("torchrun", "--nproc_per_node", "2", *TRAIN, write_run(folder, "torchrun"), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(folder / "torchrun")["losses"] == expected


def test_mpirun_of_open_mpi(folder: Path, expected: dict[int, float]) -> None:
    done = type_in(*MPIRUN, "-n", "2", sys.executable, *TRAIN, write_run(folder, "openmpi"), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(folder / "openmpi")["losses"] == expected


def test_mpirun_of_mpich(folder: Path, expected: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder / "mpich"))
    done = type_in("mpirun.mpich", "-n", "2", sys.executable, *TRAIN, write_run(folder, "mpich-run"), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(folder / "mpich-run")["losses"] == expected


def test_deepspeed_on_two_hosts_of_a_hostfile_without_ssh(folder: Path, expected: dict[int, float]) -> None:
    file = write_run(folder, "no-ssh")
    start = ["deepspeed", "--hostfile", folder / "two-hosts", "--no_ssh", "--master_addr", "127.0.0.1"]
    start += ["--master_port", str(free_port())]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda node: type_in(*start, "--node_rank", node, *TRAIN, file, timeout=300), (0, 1)))
    assert [done.returncode for done in both] == [0, 0], both
    assert metrics(folder / "no-ssh")["losses"] == expected


@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        ("openmpi", (*MPIRUN, "-hostfile", "one-host", "dora-dist", "env", "--json")),
        ("torchrun", ("torchrun", "--nproc_per_node", "2", "--no-python", "dora-dist", "env", "--json")),
        (
            "deepspeed",
            (*ONE_HOST, "--no_python", "dora-dist", "env", "--json"),
        ),
        (
            "openmpi",
            (*ONE_HOST, "--launcher", "openmpi", "--force_multi", "--no_python", "dora-dist", "env", "--json"),
        ),
        # One agent per node, which mpirun starts: its ranks count, not mpirun's.
        ("torchrun", (*MPIRUN, "-n", "1", "torchrun", "--nproc_per_node", "2", *ENV)),
    ],
    ids=["mpirun", "torchrun", "deepspeed", "deepspeed by mpirun", "torchrun by mpirun"],
)
def test_env_describes_both_ranks(
    launcher: str, command: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = type_in(*(folder / word if word == "one-host" else word for word in command))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert (found["launcher"], found["world_size"], found["backend"]) == (launcher, 2, "gloo")
    assert [(rank["rank"], rank["local_rank"], rank["local_world_size"]) for rank in found["ranks"]] == [
        (0, 0, 2),
        (1, 1, 2),
    ]
    assert {one["operation"] for one in found["collectives"]} == {"all-reduce", "all-gather"}
    assert all(one["seconds"] > 0 and one["bus_gb_per_s"] > 0 for one in found["collectives"])
    assert found["warnings"] == []


def test_env_of_one_process() -> None:
    done = type_in(sys.executable, *ENV)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (alone,) = found["ranks"]
    assert (found["launcher"], found["world_size"], found["collectives"], alone["rank"]) == ("none", 1, [], 0)
    assert alone["cpus"] >= alone["threads"] >= 1 and alone["host_memory_bytes"] > 10**8
    assert {"python", "torch", "deepspeed", "transformers", "dora_dist"} <= set(alone["versions"])


def start_rank(rank: int, world_size: int, port: int, *words: object, checkout: Path = ROOT) -> subprocess.Popen[str]:
    """A rank with the variables that another kind of launcher would set, and the code of `checkout`."""
    ours = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ours, "DS_ACCELERATOR": "cpu", "PYTHONPATH": checkout}.items():
            patch.setenv(name, str(value))
        command = [sys.executable, *map(str, words)]
        return subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ends(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and what each rank says on stderr."""
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def test_ranks_that_came_name_the_one_that_did_not() -> None:
    port = free_port()
    for status, text in ends([start_rank(rank, 3, port, *ENV, "--timeout", 25) for rank in (0, 2)]):
        assert status == 2
        assert f"rank 1 of 3 did not come to 127.0.0.1:{port} within 25 s" in text and "Traceback" not in text


def test_without_rank_0_the_message_says_where_it_was_sought() -> None:
    port = free_port()
    ((status, text),) = ends([start_rank(1, 2, port, *ENV, "--timeout", 3)])
    assert status == 2
    assert "error on rank 1: rank 1 on " in text and f"cannot meet the others at 127.0.0.1:{port}" in text


def test_variables_left_over_in_the_shell_are_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    done = type_in(*MPIRUN, "-n", "2", "dora-dist", "env")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "WORLD_SIZE = 1, but OMPI_COMM_WORLD_SIZE = 2" in done.stderr and "unset RANK WORLD_SIZE" in done.stderr


def test_mpirun_of_another_mpi_than_mpi4py_finds_is_explained(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("MPI4PY_LIBMPI", "libmpi.so.40")  # Open MPI's, while MPICH starts the ranks
    done = type_in("mpirun.mpich", "-n", "2", "dora-dist", "env")
    assert done.returncode != 0
    assert "mpich started rank 1 of 2, but to mpi4py's library (Open MPI" in done.stderr
    assert "set MPI4PY_LIBMPI" in done.stderr


def test_a_rank_with_an_old_checkout_is_named(folder: Path) -> None:
    old = folder / "old"
    shutil.copytree(ROOT / "dora_dist", old / "dora_dist", ignore=shutil.ignore_patterns("__pycache__"))
    layer = old / "dora_dist/adapters/layer.py"
    layer.write_text(layer.read_text() + "# of last week\n")
    words = ("-m", "dora_dist", "train", "--config", write_run(folder, "stale"))
    port = free_port()
    ranks = [start_rank(0, 2, port, *words), start_rank(1, 2, port, *words, checkout=old)]
    for rank, (status, text) in enumerate(ends(ranks)):
        assert status == 2, text
        assert f"error on rank {rank}: the ranks disagree" in text and "Traceback" not in text
        assert "  dora_dist/adapters/layer.py: sha256 " in text and "on rank 1 (" in text
    assert not (folder / "stale").exists()
