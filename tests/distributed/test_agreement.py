"""Ranks that would train different things say so before they start, on real ranks with really different files."""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from tests import toy
from tests.distributed.training_runs import config
from tests.ranks import run_ranks


def of_local_folders(folder: Path, *runs: dict[str, Any]) -> list[str]:
    """What this rank is told by runs whose folder, a relative path, is another one for each rank."""
    import torch.distributed as dist

    mine = folder / f"node-{dist.get_rank()}"
    mine.mkdir()
    os.chdir(mine)
    said = []
    for number, run in enumerate(runs):
        said += refusals((run, run))
        if dist.get_rank() > 0 and number == 0:  # this node has a checkpoint of that name by itself
            shutil.copytree(folder / "another", "run", dirs_exist_ok=True)  # its log is there
    return said


def refusals(*runs: tuple[dict[str, Any], dict[str, Any]]) -> list[str]:
    """What this rank is told when rank 0 starts the first configuration of each pair, and rank 1 the second."""
    import torch.distributed as dist

    from dora_dist.config import RunConfig
    from dora_dist.runtime.errors import UserError
    from dora_dist.training.run import train

    said = []
    for pair in runs:
        try:
            train(RunConfig.from_dict(pair[min(dist.get_rank(), 1)]))
            said.append("trained")
        except UserError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    folder = tmp_path_factory.mktemp("agreement")
    base = toy.base_model(folder / "base")
    data = toy.write_records(folder / "data.json", 25)
    run_dir = folder / "run"

    def run(base: Path = base, data: Path = data, **changes: dict[str, Any]) -> dict[str, Any]:
        once = {"training": {"max_steps": 1}, "checkpoint": {"save_every": None}}
        return config(base, data, run_dir, **{**once, **changes})

    other = {name: Path(shutil.copytree(base, folder / name)) for name in ("config", "weights", "less", "copy")}
    settings = json.loads((other["config"] / "config.json").read_text())
    (other["config"] / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-5}))
    toy.base_model(other["weights"], intermediate_size=54)
    (other["less"] / "generation_config.json").unlink()
    records = json.loads(data.read_text())
    (folder / "edited.json").write_text(json.dumps([{**records[0], "instruction": "Is 0 odd?"}, *records[1:]]))
    return run_ranks(
        refusals,
        3,
        (run(), run(adapter={"r": 8}, training={"max_steps": 1, "learning_rate": 0.02})),
        (run(), run(base=other["config"])),
        (run(), run(base=other["weights"])),
        (run(), run(base=other["less"])),
        (run(), run(data=folder / "edited.json")),
        (run(), run(base=other["copy"])),  # the same files in another place
    )


def test_every_rank_is_told_the_same(said: list[list[str]]) -> None:
    assert said[0] == said[1] == said[2]
    assert all("the ranks disagree" in text for text in said[0][:-1])


def test_configuration_field_by_field(said: list[list[str]]) -> None:
    first, rest = f"rank 0 ({socket.gethostname()})", f"ranks 1-2 ({socket.gethostname()})"
    assert f"  adapter.r: 4 on {first}; 8 on {rest}" in said[0][0]
    assert f"  training.learning_rate: 0.01 on {first}; 0.02 on {rest}" in said[0][0]
    assert len(said[0][0].splitlines()) == 3


@pytest.mark.parametrize(
    ("number", "file"), [(1, "config.json"), (2, "model.safetensors"), (3, "generation_config.json")]
)
def test_base_model_file_by_file(said: list[list[str]], number: int, file: str) -> None:
    assert f"  base model: {file}: " in said[0][number]


def test_a_file_that_is_missing_on_some_ranks(said: list[list[str]]) -> None:
    assert "missing on ranks 1-2" in said[0][3]


def test_data_as_tokenized(said: list[list[str]]) -> None:
    assert "  training data: 20 samples, sha256 " in said[0][4] and "base model: " not in said[0][4]


def test_the_same_files_in_different_places_are_no_disagreement(said: list[list[str]]) -> None:
    assert said[0][-1] == "trained"


def test_a_run_folder_that_is_local_to_each_node_is_refused_where_a_checkpoint_would_be_read(tmp_path: Path) -> None:
    """Three nodes with local disks: a run does well, for rank 0 alone writes; going on from it would not."""
    base, data = toy.base_model(tmp_path / "base"), toy.write_records(tmp_path / "data.json", 25)
    once = {"training": {"max_steps": 2}, "checkpoint": {"save_every": 2}}
    other = config(base, data, tmp_path / "another", **once, adapter={"r": 4, "target_modules": ["q_proj"]})
    run_ranks(refusals, 1, (other, other))
    fresh = config(base, data, Path("run"), **once)
    resumed = {**fresh, "checkpoint": {**fresh["checkpoint"], "resume": "auto"}}
    said = run_ranks(of_local_folders, 3, tmp_path, fresh, resumed)
    assert [text[0] for text in said] == ["trained"] * 3
    assert said[0] == said[1] == said[2]
    host = socket.gethostname()
    assert "checkpoint.resume: run/checkpoint-2/manifest.json: sha256 " in said[0][1]
    assert f"on rank 0 ({host}); sha256 " in said[0][1] and f" on ranks 1-2 ({host})" in said[0][1]
    assert "has to be shared by all nodes" in said[0][1]
