"""Who started a process: environments captured on ranks of real launchers, and those that contradict themselves."""

import json
from pathlib import Path

import pytest

from dora_dist.runtime import launchers
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.launchers import Launch, discover, first_host, rank_among_several

# One rank of each, not the first; Slurm 22.05, Open MPI 4.1, MPICH 4.0, Intel MPI 2021.19, torch 2.13, deepspeed 0.19.
CAPTURED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("launch_environments.json").read_text())
ALONE = Launch("none", local_rank=0, local_world_size=1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchrun", Launch("torchrun", 1, 2, 1, 2, "localhost", 35953)),
        ("deepspeed", Launch("deepspeed", 1, 2, 1, 2, "127.0.0.1", 29500)),
        ("deepspeed --no_ssh, second node", Launch("deepspeed", 1, 2, 0, 1, "10.77.0.10", 29500)),
        ("openmpi", Launch("openmpi", 1, 2, 1, 2)),
        ("mpich", Launch("mpich", 1, 2, 1, 2)),
        ("intelmpi", Launch("intelmpi", 1, 2, 1, 2)),
        ("deepspeed --launcher openmpi", Launch("openmpi", 1, 2, 1, 2)),
        ("deepspeed --launcher mpich", Launch("mpich", 1, 2, 1, 2, "127.0.0.1", 29500)),
        ("deepspeed --launcher impi", Launch("mpich", 1, 2, 1, 2, "127.0.0.1", 29500)),
        ("srun", Launch("srun", 2, 3, 0, 1, None, 15061)),
        ("srun --mpi=pmi2", Launch("srun", 1, 2, 0, 1, None, 15122)),
        ("srun on the second node", Launch("srun", 0, 1, 0, 1, "127.0.0.1", 15183)),
        # SLURM_* here are those of the batch script, or of what srun started on behalf of mpirun.
        ("mpich in sbatch", Launch("mpich", 2, 3, 0, 1)),
        ("openmpi in sbatch", Launch("openmpi", 3, 4, 1, 2)),
        ("deepspeed in sbatch", Launch("deepspeed", 1, 2, 1, 2, "127.0.0.1", 29500)),
        ("torchrun in srun", Launch("torchrun", 1, 2, 0, 1, "n0", 37669)),
        ("torchrun in mpirun", Launch("torchrun", 1, 2, 1, 2, "localhost", 43613)),
        # One process, though SLURM_PROCID and SLURM_NTASKS are set.
        ("sbatch shell", ALONE),
        ("salloc shell", ALONE),
    ],
)
def test_captured_environments(name: str, expected: Launch) -> None:
    assert discover(CAPTURED[name]) == expected
    assert rank_among_several(CAPTURED[name]) == (expected.rank if expected.world_size > 1 else None)


def test_every_captured_environment_is_tested() -> None:
    (tested,) = (mark for mark in test_captured_environments.pytestmark if mark.name == "parametrize")
    assert {name for name, _ in tested.args[1]} == set(CAPTURED)


def test_no_launcher() -> None:
    assert discover({}) == discover({"WORLD_SIZE": "1"}) == ALONE
    assert rank_among_several({}) is None


def test_the_variables_by_hand() -> None:
    by_hand = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "n0", "MASTER_PORT": "1234"}
    assert discover(by_hand) == Launch("environment", 2, 4, 0, None, "n0", 1234)
    assert discover({**by_hand, "LOCAL_WORLD_SIZE": "2"}).local_world_size == 2
    assert discover({"RANK": "0", "WORLD_SIZE": "1"}) == Launch("environment", 0, 1)


@pytest.mark.parametrize("name", ["openmpi", "mpich", "srun"])
def test_what_the_user_says_of_the_meeting_point_counts(name: str) -> None:
    launch = discover({**CAPTURED[name], "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4321"})
    assert (launch.launcher, launch.address, launch.port) == (name, "10.0.0.9", 4321)


@pytest.mark.parametrize("name", ["openmpi", "mpich", "srun"])
def test_variables_that_agree_with_the_launcher_are_welcome(name: str) -> None:
    found = discover(CAPTURED[name])
    assert discover({**CAPTURED[name], "WORLD_SIZE": str(found.world_size)}) == found
    assert discover({**CAPTURED[name], "WORLD_SIZE": str(found.world_size), "RANK": str(found.rank)}) == found


@pytest.mark.parametrize(
    ("name", "left_over", "says"),
    [
        (
            "openmpi",
            {"RANK": "0", "WORLD_SIZE": "2"},
            ["RANK = 0", "OMPI_COMM_WORLD_RANK = 1", "unset RANK WORLD_SIZE"],
        ),
        ("openmpi", {"WORLD_SIZE": "8"}, ["WORLD_SIZE = 8", "OMPI_COMM_WORLD_SIZE = 2", "(unset WORLD_SIZE)"]),
        ("mpich", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ["RANK = 0", "PMI_RANK = 1", "LOCAL_RANK)"]),
        ("srun", {"WORLD_SIZE": "4"}, ["WORLD_SIZE = 4", "SLURM_STEP_NUM_TASKS = 3", "srun started"]),
        ("srun", {"RANK": "x"}, ["RANK = 'x'", "not a whole number"]),
        ("sbatch shell", {"WORLD_SIZE": "4"}, ["WORLD_SIZE = 4", "not RANK", "start with", "srun"]),
        ("torchrun", {"RANK": "2"}, ["RANK = 2 with WORLD_SIZE = 2", "count from 0"]),
        ("openmpi", {"OMPI_COMM_WORLD_RANK": "2"}, ["OMPI_COMM_WORLD_RANK = 2 with OMPI_COMM_WORLD_SIZE = 2"]),
        ("deepspeed", {"MASTER_PORT": "70000"}, ["MASTER_PORT = 70000", "65535"]),
        ("deepspeed", {"MASTER_PORT": "-1"}, ["MASTER_PORT = '-1'"]),
        (None, {"RANK": "3"}, ["RANK = 3", "not WORLD_SIZE", "unset RANK"]),
        (None, {"RANK": "1", "WORLD_SIZE": "2"}, ["not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"]),
    ],
)
def test_contradictions_name_variables_values_and_the_remedy(
    name: str | None, left_over: dict[str, str], says: list[str]
) -> None:
    environment = {**(CAPTURED[name] if name else {}), **left_over}
    with pytest.raises(UserError) as refused:
        discover(environment)
    for part in says:
        assert part in str(refused.value)
    assert rank_among_several(environment) is None


def test_each_step_and_each_start_of_a_slurm_job_has_a_port_of_its_own() -> None:
    def port(**changes: str) -> int | None:
        return discover({**CAPTURED["srun"], **changes}).port

    ports = [
        port(SLURM_JOB_ID=job, SLURM_STEP_ID=step, SLURM_RESTART_COUNT=restart)
        for job in ("41", "42")
        for step in ("0", "1")
        for restart in ("0", "1")
    ]
    assert len(set(ports)) == 8
    assert port(SLURM_PROCID="0", SLURM_NODEID="0") == port()  # the same on every rank
    biggest = port(SLURM_JOB_ID=str(2**31), SLURM_STEP_ID="99999")
    assert biggest is not None and 15_000 <= biggest < 30_000


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "ranks"),
    [("2(x3)", "2", 2), ("4,2(x2),1", "0", 4), ("4,2(x2),1", "3", 1), ("7", "0", 7)],
)
def test_ranks_of_a_slurm_node(tasks_per_node: str, node: str, ranks: int) -> None:
    changed = {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_NODEID": node}
    assert discover({**CAPTURED["srun"], **changed}).local_world_size == ranks


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n7", "n7"), ("n[3-5,9],m1", "n3"), ("gpu-[008-010]", "gpu-008"), ("a1,a[2-3]", "a1"), ("r[1-2]n[4,6]", "r1n4")],
)
def test_first_host_without_scontrol(nodes: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # as in a container; with Slurm's own list: tests/cluster
    assert first_host(nodes) == first


def test_source_address_is_one_of_this_machine() -> None:
    assert launchers.source_address("127.0.0.1") == "127.0.0.1"
    with pytest.raises(OSError):
        launchers.source_address("no-such-host.invalid")
