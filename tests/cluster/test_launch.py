"""Ranks on two nodes, as a user starts them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests import toy
from tests.cluster.workspace import Workspace
from tests.conftest import ROOT


def test_env_describes_every_node(workspace: Workspace) -> None:
    said = workspace.run("srun", "--nodes", 2, "python", "-m", "dora_dist", "env")
    assert "srun: 2 ranks" in said and "rank 0 (n0)" in said and "rank 1 (n1)" in said, said


def test_srun_computes_what_torchrun_does(workspace: Workspace, uninterrupted: dict[int, float]) -> None:
    file = workspace.write_config("srun", training={"max_steps": 10})
    workspace.run("srun", "-N2", "python", ROOT / "launch" / "train.py", "--config", file)
    assert workspace.losses("srun") == {step: uninterrupted[step] for step in range(1, 11)}


@pytest.mark.parametrize(
    "launcher",
    [
        "mpirun --allow-run-as-root -hostfile hosts --bind-to none -x PATH -x PYTHONPATH -x DS_ACCELERATOR python",
        "deepspeed --hostfile hosts",
    ],
    ids=["mpirun", "deepspeed"],
)
def test_a_hostfile_computes_what_torchrun_does(
    workspace: Workspace, uninterrupted: dict[int, float], tmp_path: Path, launcher: str
) -> None:
    """Over ssh: nothing of the environment is there on the other machine, but what the launcher carries."""
    for name in ("base", "data.json"):
        (tmp_path / name).symlink_to(workspace.folder / name)
    (tmp_path / "hosts").write_text("n0 slots=1\nn1 slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    here = replace(workspace, folder=tmp_path)  # DeepSpeed's launcher cannot work in a folder with a space in its name
    file = here.write_config("hostfile", training={"max_steps": 10})
    command = [*launcher.split(), ROOT / "launch" / "train.py", "--config", file]
    here.run(*command, PATH=f"{here.cluster.folder}:{here.cluster.environment['PATH']}")
    assert here.losses("hostfile") == {step: uninterrupted[step] for step in range(1, 11)}


def test_sbatch_computes_what_torchrun_does(workspace: Workspace, uninterrupted: dict[int, float]) -> None:
    file = workspace.write_config("sbatch")
    job = workspace.sbatch("slurm/multinode.sh", file, "--training.max_steps", 10)
    assert workspace.finish(job) == "COMPLETED", workspace.said(job)
    assert workspace.losses("sbatch") == {step: uninterrupted[step] for step in range(1, 11)}
    assert {file.name for file in (workspace.folder / "logs" / job).glob("*.log")} == {"n0-0.log", "n1-1.log"}


def test_from_sbatch_to_the_merged_model(workspace: Workspace) -> None:
    """The quickstart's own command lines; a toy stands where its base model would."""
    quickstart = workspace.folder / "runs" / "quickstart"
    (quickstart / "data").mkdir(parents=True)
    toy.base_model(quickstart / "base")
    records = [{"prompt": record["instruction"], "completion": record["output"]} for record in toy.records(40)]
    (quickstart / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    job = workspace.sbatch("slurm/multinode.sh", "configs/quickstart.json", "--training.max_steps", 2)
    assert workspace.finish(job) == "COMPLETED", workspace.said(job)
    workspace.run("dora-dist", "consolidate", "runs/quickstart/train", "--output", "merged")
    assert (workspace.folder / "merged" / "model.safetensors").exists()


def test_one_rank_per_gpu_where_slurm_has_gpus(workspace: Workspace) -> None:
    file = workspace.write_config("gpus", training={"max_steps": 1})
    job = workspace.sbatch("--partition", "gpu", "--nodes", 1, "slurm/multinode.sh", file)
    assert workspace.finish(job) == "COMPLETED", workspace.said(job)
    assert {file.name for file in (workspace.folder / "logs" / job).glob("*.log")} == {"g0-0.log", "g0-1.log"}
    assert json.loads((workspace.folder / "runs/gpus/deepspeed.json").read_text())["gradient_accumulation_steps"] == 3


def test_what_cannot_start_is_not_started_again(workspace: Workspace) -> None:
    for words, says in (
        (["nowhere.json"], "nowhere.json: no such config file"),
        (["configs/quickstart.json", "--training.max_step", "1"], "did you mean training.max_steps"),
        ([workspace.write_config("bad", adapter={"target_modules": ["query"]})], "'query' matches no linear layer"),
    ):
        job = workspace.sbatch("slurm/multinode.sh", *words)
        assert workspace.finish(job) == "FAILED"
        assert workspace.cluster.job(job)["ExitCode"] == "2:0"
        assert says in Path(workspace.folder / f"slurm-{job}.out").read_text(), workspace.said(job)
