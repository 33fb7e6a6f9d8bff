"""A mixture on real ranks: the same draws at any number of ranks and after a resume, and the loss of each source."""

import json
from pathlib import Path
from typing import Any

import pytest

from dora_dist.checkpoint import run_folder
from tests import toy
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks


def mixed(folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    short = {"path": str(folder / "short.jsonl"), "weight": 3.0, "format": "completion", "name": "short"}
    data = {"train": [{"path": str(folder / "data.json")}, short], "loss_on": "answer", "cutoff_len": 400}
    training = {"micro_batch_size": 2, "schedule": "constant", **changes.pop("training", {})}
    return config(folder / "base", folder / "data.json", folder / name, data=data, training=training, **changes)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in run_folder.metrics(run_dir) if "loss" in line]


def test_a_mixture_is_one_run_whatever_the_ranks_and_says_the_loss_of_each_source(tmp_path: Path) -> None:
    toy.training_folder(tmp_path)
    rows = [{"prompt": f"is {i} odd?", "completion": "no" if i % 2 else "yes"} for i in range(9)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_ranks(run, 2, mixed(tmp_path, "whole"))
    run_ranks(run, 1, mixed(tmp_path, "parts", training={"max_steps": 3}))
    run_ranks(run, 3, mixed(tmp_path, "parts", checkpoint={"resume": "auto"}))
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [line["step"] for line in whole] == [line["step"] for line in parts] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(whole, parts, strict=True):
        names = [name for name in ("data", "short") if f"loss/{name}" in one]
        assert names == [name for name in ("data", "short") if f"loss/{name}" in other] != []
        tokens = sum(one[f"learnt/{name}"] for name in names)
        mean = sum(one[f"loss/{name}"] * one[f"learnt/{name}"] for name in names) / tokens
        assert mean == pytest.approx(one["loss"], rel=1e-4)
        for key in ("loss", *(f"{kind}/{name}" for name in names for kind in ("loss", "learnt"))):
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert sum(line.get("learnt/data", 0) for line in whole) > 0
