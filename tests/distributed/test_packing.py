"""Packed rows and losses in chunks on real ranks: the losses, evaluations and values of the plain run."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dora_dist.checkpoint import run_folder
from tests import toy
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks

ROWS = {"packing": True, "packing_length": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and 19 short texts to train on, of very different lengths: the last of two batches has 7."""
    folder = tmp_path_factory.mktemp("packing")
    toy.base_model(folder / "base")
    records = [{"prompt": "is it " + "very " * (5 * i % 13), "completion": f"even? {i % 2 == 0}"} for i in range(22)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def packing_config(folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    data = {"format": "completion", "cutoff_len": 64, "validation_samples": 3, **changes.pop("data", {})}
    training = {"max_steps": 3, "global_batch_size": 12, "micro_batch_size": 2, "eval_every": 3}
    training |= changes.pop("training", {})
    checkpoint = {"save_every": 2, **changes.pop("checkpoint", {})}
    return config(
        folder / "base", folder / "data.json", folder / name, data=data, training=training, checkpoint=checkpoint
    )


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    """The same three steps; every entry is rank 0's metrics."""
    one = {
        "plain": packing_config(folder, "plain"),
        "chunked": packing_config(folder, "chunked", data=ROWS, training={"loss_chunk": 16}),
    }
    two = {"packed": packing_config(folder, "packed", data=ROWS, training={"activation_checkpointing": True})}
    go_on = {"resume": str(folder / "plain" / "checkpoint-2")}
    three = {"resumed": packing_config(folder, "resumed", data=ROWS, training={"loss_chunk": 7}, checkpoint=go_on)}
    found: dict[str, Any] = {}
    for ranks, configurations in ((1, one), (2, two), (3, three)):
        found |= dict(zip(configurations, run_ranks(run, ranks, *configurations.values())[0], strict=True))
    return found


@pytest.mark.parametrize(("name", "first"), [("chunked", 1), ("packed", 1), ("resumed", 3)])
def test_losses_evaluations_and_trained_values_are_those_of_the_plain_run(
    runs: dict[str, Any], folder: Path, name: str, first: int
) -> None:
    """Whatever the number of ranks; a run may be packed from where another stopped that was not."""
    plain = [runs["plain"]["losses"][step] for step in range(first, 4)]
    assert [runs[name]["losses"][step] for step in range(first, 4)] == pytest.approx(plain, abs=1e-5)
    assert runs[name]["eval"] == pytest.approx(runs["plain"]["eval"], abs=1e-5)
    adapter = "checkpoint-3/adapter/adapter_model.safetensors"
    trained, expected = (load_file(folder / run / adapter) for run in (name, "plain"))
    for parameter, values in expected.items():
        assert toy.relative_error(trained[parameter], values) < 1e-3, parameter  # AdamW's first steps are signs
    lines = {run: _lines(folder / run) for run in (name, "plain")}
    for packed, alone in zip(lines[name], lines["plain"][first - 1 :], strict=True):
        assert packed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert packed["tokens_per_step"] == pytest.approx(alone["tokens_per_step"], abs=12)  # and a token a filler


def test_rows_are_read_in_fewer_passes_with_less_padding(runs: dict[str, Any], folder: Path) -> None:
    passes = {
        run: json.loads((folder / run / "deepspeed.json").read_text())["gradient_accumulation_steps"] for run in runs
    }
    assert passes["plain"] == 6 and passes["chunked"] < 4 and passes["packed"] < 3 and passes["resumed"] <= 2
    filled = {run: _lines(folder / run)[0]["filled"] for run in ("plain", "chunked")}
    assert filled["plain"] < 0.85 < filled["chunked"]


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = run_folder.metrics(run_dir)
    return [line for line in lines if "loss" in line]
