"""A streamed run: the losses of a run over the same records in memory, at any number of ranks, and after a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from dora_dist.checkpoint import run_folder
from tests import toy
from tests.distributed.training_runs import config, fails, run
from tests.ranks import run_ranks

STEPS, BATCH, SEED = 6, 6, 42


def streamed(folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """A run over three files of ten records, twelve of which are shuffled at a time."""
    files = [str(folder / f"{part}.jsonl") for part in "abc"]
    data = {"train": files, "validation_samples": 0, "streaming": True, "shuffle_buffer": 12, **changes.pop("data", {})}
    training = {"micro_batch_size": 2, "schedule": "constant", **changes.pop("training", {})}
    return config(folder / "base", folder / "data.json", folder / name, data=data, training=training, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("stream")
    toy.training_folder(found)
    rows = toy.records(30)
    for k, part in enumerate("abc"):
        (found / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[10 * k : 10 * k + 10]))
    # The same records for a run in memory, at the places where its first epoch looks for them.
    order = [row for n in range(3) for row in window([rows[i] for i in _passes()][12 * n : 12 * n + 12], n)]
    places = torch.randperm(len(order), generator=torch.Generator().manual_seed(SEED * 1_000_003)).tolist()
    whole = [row for _, row in sorted(zip(places, order, strict=True), key=lambda each: int(each[0]))]
    (found / "whole.json").write_text(json.dumps(whole))
    return found


def _passes() -> list[int]:
    """The rows of two passes, whose files come in an order of each pass."""
    return [10 * k + i for n in range(2) for k in random(n, 1, 3) for i in range(10)]


def random(number: int, kind: int, size: int) -> list[int]:
    seed = ((SEED * 1_000_003 + number) * 8191 + kind) % 2**62
    found: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def window(rows: list[Any], number: int) -> list[Any]:
    return [rows[k] for k in random(number, 0, len(rows))]


def losses(folder: Path, name: str) -> list[float]:
    lines = run_folder.metrics(folder / name)
    return [line["loss"] for line in lines if "loss" in line]


def test_it_has_the_losses_of_the_same_records_in_memory_at_any_number_of_ranks_and_resumed(folder: Path) -> None:
    memory = {"train": str(folder / "whole.json"), "streaming": False, "shuffle_buffer": 10_000}
    half, on = {"training": {"max_steps": 3}}, {"checkpoint": {"resume": "auto"}}
    run_ranks(run, 1, streamed(folder, "one"), streamed(folder, "memory", data=memory), timeout=600)
    assert losses(folder, "one") == losses(folder, "memory") and len(losses(folder, "one")) == STEPS
    parts = [streamed(folder, "parts", **half), streamed(folder, "parts", **on)]
    run_ranks(run, 2, streamed(folder, "two"), *parts, timeout=600)
    assert losses(folder, "two") == losses(folder, "parts")  # to the last bit
    shutil.copytree(folder / "two", folder / "three")
    shutil.rmtree(folder / "three" / "checkpoint-6")
    run_ranks(run, 3, streamed(folder, "three", **on, data={"num_workers": 1}), timeout=600)
    for name in ("two", "three"):
        assert losses(folder, name) == pytest.approx(losses(folder, "one"), rel=1e-4)


class Loses(TrainerCallback):
    """Takes a file away after the first step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.file.unlink(missing_ok=True)


def after_few(own: dict[str, Any], skips: list[dict[str, Any]], bad: dict[str, Any]) -> list[str]:
    """What three runs end with, of which a start looks at the first three records alone; `skips` has several starts."""
    import os

    from accelerate.state import AcceleratorState

    from dora_dist.config import RunConfig
    from dora_dist.data import reading
    from dora_dist.runtime.errors import UserError
    from dora_dist.training.run import train

    reading.CHUNK = 3
    found = [fails(bad)]
    run(*skips)
    AcceleratorState._reset_state(reset_partial_state=True)
    if os.environ["RANK"] == "1":  # as another node, which has a copy of the file
        own["data"]["train"] = [name.replace("a.jsonl", "own/a.jsonl") for name in own["data"]["train"]]
    try:
        train(RunConfig.from_dict(own), [Loses(Path(own["data"]["train"][-1]))] if os.environ["RANK"] == "1" else [])
    except UserError as error:
        return [*found, str(error)]
    raise AssertionError("the run should have ended")


def test_what_one_rank_cannot_read_ends_the_run_on_all_or_is_counted(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    for name in ("data.json", "a.jsonl", "b.jsonl"):
        shutil.copy(folder / name, tmp_path / name)
    rows = [json.dumps(row) for row in toy.records(30)]
    rows[7] = rows[7][:-3]
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    (tmp_path / "own").mkdir()
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "own" / "a.jsonl")
    alone = {"train": [str(tmp_path / "bad.jsonl")], "shuffle_buffer": 1}
    starts = {"training": {"max_steps": 3}}, {"checkpoint": {"resume": "auto"}}
    skips = [streamed(tmp_path, "skips", data={**alone, "bad_records": "skip"}, **start) for start in starts]
    names = [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]
    own = streamed(tmp_path, "own-run", data={"train": names, "shuffle_buffer": 1})
    for bad, lost in run_ranks(after_few, 2, own, skips, streamed(tmp_path, "bad", data=alone), timeout=600):
        assert "bad.jsonl, line 8 is not JSON" in bad and 'data.bad_records = "skip" would leave such' in bad
        assert "own/a.jsonl cannot be read: No such file" in lost
    lines = run_folder.metrics(tmp_path / "skips")
    assert [line["records_skipped"] for line in lines if "records_skipped" in line] == [1.0]
    assert len(losses(tmp_path, "skips")) == STEPS
    counts = json.loads((tmp_path / "skips" / "checkpoint-6" / "manifest.json").read_text())["records_left_out"]
    assert counts == {"read": STEPS * BATCH, "left_out": 1, "bad": 1, "without": 0}
