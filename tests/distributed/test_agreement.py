"""Ranks that would train different things say so before they start, on real ranks with really different files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import toy
from tests.distributed.training_runs import config
from tests.ranks import run_ranks


def refusals(*runs: tuple[dict[str, Any], dict[str, Any]]) -> list[str]:
    """What this rank is told when rank 0 starts the first configuration of each pair, and rank 1 the second."""
    import torch.distributed as dist

    from dora_dist.config import RunConfig
    from dora_dist.errors import UserError
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
    import socket

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
