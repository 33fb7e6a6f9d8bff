"""Ranks on two nodes, as a user starts them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dora_dist.weights.safetensors_io import TensorFolder
from tests import llava, toy
from tests.cluster.workspace import Workspace
from tests.conftest import ROOT
from tests.distributed.training_runs import options


def test_env_describes_every_node(workspace: Workspace) -> None:
    said = workspace.run("srun", "--nodes", 2, "python", "-m", "dora_dist", "env")
    assert "srun: 2 ranks" in said and "rank 0 (n0)" in said and "rank 1 (n1)" in said, said


def test_srun_computes_what_torchrun_does(workspace: Workspace, uninterrupted: dict[int, float]) -> None:
    file = workspace.write_config("srun", training={"max_steps": 10})
    workspace.run("srun", "-N2", "python", ROOT / "launch" / "train.py", "--config", file)
    assert workspace.losses("srun") == {step: uninterrupted[step] for step in range(1, 11)}
    logs = [workspace.folder / "runs" / "srun" / name for name in ("run.log", "run.n1.log")]
    ours, theirs = (log.read_text() for log in logs)  # each node writes one of its own
    assert "[rank 0]" in ours and "[rank 1]" not in ours and "finished " in ours
    assert all("[rank 1]" in line for line in theirs.splitlines())  # which has little to say, or nothing


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


def test_llava_on_two_nodes_computes_what_one_process_does(workspace: Workspace) -> None:
    """The batch script's own recipe, scaled down by overrides: one rank makes up 128 records by more passes."""
    llava.model(workspace.folder / "llava")
    data = llava.write(workspace.folder / "conversations", 60, 80)
    small = {
        "model.path": "llava",
        "model.dtype": "fp32",
        "adapter.r": 4,
        "adapter.lora_alpha": 8,
        "adapter.dropout": 0,
        "data.train": data,
        "data.image_folder": data.parent / "pictures",
        "data.num_workers": 0,
        "training.max_steps": 2,
        "training.micro_batch_size": 32,
        "logging.every": 1,
    }
    one, two = (options({**small, "checkpoint.run_dir": f"runs/llava-{ranks}"}) for ranks in ("one", "two"))
    job = workspace.sbatch("slurm/llava_multinode.sh", *two)
    workspace.run("python", ROOT / "launch" / "train.py", "--config", "configs/llava7b_dora.json", *one)
    assert workspace.finish(job) == "COMPLETED", workspace.said(job)
    losses = workspace.losses("llava-two")
    assert list(losses) == [1, 2]
    assert losses == pytest.approx(workspace.losses("llava-one"), abs=1e-5)
    for name, passes in (("one", 4), ("two", 2)):
        engine = json.loads((workspace.folder / f"runs/llava-{name}/deepspeed.json").read_text())
        assert (engine["train_batch_size"], engine["gradient_accumulation_steps"]) == (128, passes)
    adapter = workspace.folder / "runs/llava-two/checkpoint-2/adapter/adapter_model.safetensors"
    trained = TensorFolder.open(adapter).entries
    assert {name.split(".")[3] for name in trained} == {"language_model", "multi_modal_projector"}


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
