"""What clusters do to jobs: they go on by themselves, and every loss is that of a run to which nothing happened."""

import random
from pathlib import Path

import pytest

from tests.cluster.workspace import Workspace

# Every run of the tests draws other steps for what happens; the names of the tests show them.
EARLY, LATE = random.randint(1, 6), random.randint(16, 20)


def restarts(workspace: Workspace, job: str) -> int:
    return int(workspace.cluster.job(job)["Restarts"])


def went_on_by_itself(workspace: Workspace, job: str, name: str, uninterrupted: dict[int, float], times: int) -> None:
    assert workspace.finish(job) == "COMPLETED", workspace.said(job)
    assert restarts(workspace, job) >= times, workspace.said(job)
    assert workspace.losses(name) == uninterrupted, workspace.said(job)


@pytest.mark.parametrize(("early", "late"), [(EARLY, LATE)])
def test_a_rank_is_killed_and_then_the_job_is_preempted(
    workspace: Workspace, uninterrupted: dict[int, float], early: int, late: int
) -> None:
    job = workspace.sbatch("slurm/multinode.sh", workspace.write_config("killed"))
    workspace.wait_for_step(job, "killed", early)
    workspace.cluster.ranks(job)[early % 2].kill()
    workspace.wait(job, lambda: restarts(workspace, job) == 1, "the job is requeued")
    workspace.wait_for_step(job, "killed", late)
    workspace.sbatch("--partition", "urgent", "--nodes", 2, "--exclusive", "--wrap", "true")
    went_on_by_itself(workspace, job, "killed", uninterrupted, times=2)
    assert "137" in workspace.said(job) and "75" in workspace.said(job)


@pytest.mark.parametrize(("early", "late"), [(EARLY, LATE)])
def test_first_one_node_is_lost_and_then_the_other(
    workspace: Workspace, uninterrupted: dict[int, float], early: int, late: int
) -> None:
    job = workspace.sbatch("slurm/multinode.sh", workspace.write_config("lost"))
    for times, (node, step) in enumerate([("n0", early), ("n1", late)], start=1):
        workspace.wait_for_step(job, "lost", step)
        workspace.cluster.lose_node(node)
        workspace.wait(job, lambda times=times: restarts(workspace, job) == times, "Slurm sees it")
        workspace.cluster.start_node(node)
    went_on_by_itself(workspace, job, "lost", uninterrupted, times=2)


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
    went_on_by_itself(workspace, job, "limit", uninterrupted, times=1)


def test_a_cancelled_job_saves_and_does_not_come_back(workspace: Workspace) -> None:
    file = workspace.write_config("cancelled", checkpoint={"save_every": None})
    job = workspace.sbatch("slurm/multinode.sh", file)
    workspace.wait_for_step(job, "cancelled", 3)
    workspace.run("scancel", job)
    workspace.wait(job, lambda: "not requeued from here" in workspace.said(job), "it ends")
    assert workspace.finish(job) == "CANCELLED"
    assert list((workspace.folder / "runs" / "cancelled").glob("checkpoint-*")), workspace.said(job)


def test_a_job_without_progress_gives_up(workspace: Workspace) -> None:
    job = workspace.sbatch("slurm/multinode.sh", workspace.write_config("hopeless"), MAX_RESTARTS="0")
    workspace.wait(job, lambda: len(workspace.cluster.ranks(job)) == 2, "two ranks")
    workspace.cluster.ranks(job)[0].kill()
    assert workspace.finish(job) == "FAILED", workspace.said(job)
    assert "MAX_RESTARTS" in Path(workspace.folder / f"slurm-{job}.out").read_text()
