"""The rank helper itself: results in order, every kind of failure is raised, and nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def alive(pid: int) -> bool:
    """False once the process is gone (an unreaped zombie counts as gone: it runs no code)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def note_pid(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def assert_all_gone(folder: Path, expected: int) -> None:
    """Within 10 s: a killed process that is nobody's child any more dies while its killer goes on."""
    pids = [int(path.name) for path in folder.iterdir()]
    assert len(pids) == expected
    for _ in range(100):
        if not any(map(alive, pids)):
            break
        time.sleep(0.1)
    assert [pid for pid in pids if alive(pid)] == []


def sum_of_ranks(folder: Path, scale: float) -> dict[str, object]:
    note_pid(folder)
    total = torch.tensor([scale * dist.get_rank()])
    dist.all_reduce(total)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in names}
    return {"rank": dist.get_rank(), "total": total, "environment": environment}


def raise_on_rank_1(folder: Path) -> None:
    note_pid(folder)
    dist.barrier()  # the other rank is ended with this one, and is to be counted
    if dist.get_rank() == 1:
        raise KeyError("a lost key")
    dist.barrier()


def hang_on_rank_0(folder: Path) -> None:
    note_pid(folder)
    while dist.get_rank() == 0:
        time.sleep(1)


def kill_rank_1(folder: Path) -> None:
    note_pid(folder)
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exit_early(folder: Path) -> None:
    note_pid(folder)
    sys.exit(3)


def leave_a_child(folder: Path) -> None:
    note_pid(folder)
    child = subprocess.Popen(["sleep", "1000"])
    (folder / str(child.pid)).touch()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_back_in_rank_order(tmp_path: Path, world_size: int) -> None:
    results = run_ranks(sum_of_ranks, world_size, tmp_path, 10.0)
    assert [result["rank"] for result in results] == list(range(world_size))
    expected = 10.0 * sum(range(world_size))
    assert [result["total"].item() for result in results] == [expected] * world_size
    for rank, result in enumerate(results):
        environment = result["environment"]
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == str(world_size)
        assert environment["DS_ACCELERATOR"] == "cpu"
        assert int(environment["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // world_size)
    assert "RANK" not in os.environ
    assert_all_gone(tmp_path, world_size)


def test_an_exception_names_its_rank(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2: Traceback.*raise_on_rank_1.*KeyError: 'a lost"):
        run_ranks(raise_on_rank_1, 2, tmp_path)
    assert_all_gone(tmp_path, 2)


def test_a_hang_ends_and_says_where(tmp_path: Path) -> None:
    message = r"(?s)1 of 2 ranks failed\n--- rank 0 of 2: not done after 20 s.*hang_on_rank_0"
    with pytest.raises(RankError, match=message):
        run_ranks(hang_on_rank_0, 2, tmp_path, timeout=20.0)
    assert_all_gone(tmp_path, 2)


def test_a_killed_rank_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 of 2: died with exit code -9"):
        run_ranks(kill_rank_1, 2, tmp_path)
    assert_all_gone(tmp_path, 2)


def test_leaving_by_sys_exit_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="SystemExit: 3"):
        run_ranks(exit_early, 1, tmp_path)


def test_a_ranks_own_children_are_killed(tmp_path: Path) -> None:
    run_ranks(leave_a_child, 1, tmp_path)
    assert_all_gone(tmp_path, 2)


def test_an_unimportable_function_is_a_failure() -> None:
    with pytest.raises((AttributeError, RankError)):
        run_ranks(lambda: None, 1)


def test_ranks_die_with_their_parent(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from tests.ranks import run_ranks\n"
        "from tests.unit.test_ranks import hang_on_rank_0\n"
        f"run_ranks(hang_on_rank_0, 1, Path({str(tmp_path)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    while not list(tmp_path.iterdir()):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert_all_gone(tmp_path, 1)
