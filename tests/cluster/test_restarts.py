"""What clusters do to jobs: they go on by themselves, and the losses are those of a run that nothing happened to."""

import random
from pathlib import Path

import pytest

from tests.cluster.workspace import Workspace

# Every run draws another moment; a failing one can be repeated from what its name shows.
MOMENT = random.randint(1, 15)


def finished_by_itself(workspace: Workspace, job: str, name: str, uninterrupted: dict[int, float]) -> None:
    assert workspace.finish(job) == "COMPLETED", workspace.said(job)
    assert int(workspace.cluster.job(job)["Restarts"]) >= 1, workspace.said(job)
    assert workspace.losses(name) == uninterrupted, workspace.said(job)


@pytest.mark.parametrize("step", [MOMENT])
def test_a_rank_is_killed(workspace: Workspace, uninterrupted: dict[int, float], step: int) -> None:
    job = workspace.sbatch("slurm/multinode.sh", workspace.write_config("killed"))
    workspace.wait_for_step(job, "killed", step)
    workspace.cluster.ranks(job)[step % 2].kill()
    finished_by_itself(workspace, job, "killed", uninterrupted)


@pytest.mark.parametrize("node", ["n0", "n1"])
def test_a_node_is_lost(workspace: Workspace, uninterrupted: dict[int, float], node: str) -> None:
    name = f"lost-{node}"
    job = workspace.sbatch("slurm/multinode.sh", workspace.write_config(name))
    workspace.wait_for_step(job, name, MOMENT)
    workspace.cluster.lose_node(node)
    workspace.wait(job, lambda: workspace.cluster.job(job)["JobState"] == "PENDING", "the loss is seen")
    workspace.cluster.start_node(node)
    finished_by_itself(workspace, job, name, uninterrupted)


def test_the_time_limit_is_reached(workspace: Workspace, uninterrupted: dict[int, float]) -> None:
    """Slurm's shortest limit is a minute: the ranks are held up until it announces the end."""
    file = workspace.write_config("limit")
    job = workspace.sbatch("--time", 1, "--signal", "B:USR1@1", "slurm/multinode.sh", file)
    workspace.wait_for_step(job, "limit", 5)
    ranks = workspace.cluster.ranks(job).values()
    for rank in ranks:
        rank.suspend()
    workspace.wait(job, lambda: "asked to stop" in workspace.said(job), "the end is announced")
    for rank in ranks:
        rank.resume()
    finished_by_itself(workspace, job, "limit", uninterrupted)


def test_the_job_is_preempted(workspace: Workspace, uninterrupted: dict[int, float]) -> None:
    job = workspace.sbatch("slurm/multinode.sh", workspace.write_config("preempted"))
    workspace.wait_for_step(job, "preempted", 5)
    workspace.sbatch("--partition", "urgent", "--nodes", 2, "--exclusive", "--wrap", "true")
    finished_by_itself(workspace, job, "preempted", uninterrupted)


def test_a_cancelled_job_saves_and_does_not_come_back(workspace: Workspace) -> None:
    job = workspace.sbatch("slurm/multinode.sh", workspace.write_config("cancelled", checkpoint={"save_every": None}))
    workspace.wait_for_step(job, "cancelled", 3)
    workspace.run("scancel", job)
    assert workspace.finish(job) == "CANCELLED"
    assert list((workspace.folder / "runs" / "cancelled").glob("checkpoint-*")), workspace.said(job)
    assert "the job was cancelled" in workspace.said(job)


def test_a_job_without_progress_gives_up(workspace: Workspace) -> None:
    job = workspace.sbatch("slurm/multinode.sh", workspace.write_config("hopeless"), MAX_RESTARTS="0")
    workspace.wait(job, lambda: len(workspace.cluster.ranks(job)) == 2, "two ranks")
    workspace.cluster.ranks(job)[0].kill()
    assert workspace.finish(job) == "FAILED", workspace.said(job)
    assert "MAX_RESTARTS" in Path(workspace.folder / f"slurm-{job}.out").read_text()
