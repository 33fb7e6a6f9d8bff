"""States that every rank writes its own part of: the numbers of one file, at any world size, whole or not at all."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.adapter_folders import find_adapter
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.checkpoint.state import Masters, open_state, state_file
from tests import toy
from tests.distributed.test_training import limit_file_size
from tests.distributed.training_runs import config, fails, metrics, run
from tests.ranks import RankError, run_ranks

PIECE = 1000  # elements: toy weights too are written and read in several pieces
SETTINGS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 40},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
DYNAMIC = {
    "dynamic_rank": True,
    "prune_start": 0.2,
    "prune_stop": 0.6,
    "prune_every": 1,
    "trained_modules": ["lm_head"],
}


def full(folder: Path, name: str, resume: str | None = None) -> dict[str, Any]:
    """A run that trains the whole model, saved after 3 and 6 steps."""
    sections = config(folder / "base", folder / "data.json", folder / name, checkpoint={"resume": resume})
    return sections | {"adapter": {"method": "full"}}


def dynamic(folder: Path, name: str) -> dict[str, Any]:
    """One whose second phase goes on from what survived of the adapter, and a head that is trained in full."""
    return config(folder / "base", folder / "data.json", folder / name, adapter=DYNAMIC)


def shard_from_the_first_byte() -> None:
    from dora_dist.checkpoint import format, state_writers

    state_writers.SHARDED_FROM_BYTES, state_writers.PIECE, format.PIECE = 0, PIECE, PIECE


def run_sharded(*configurations: dict[str, Any]) -> list[dict[str, Any]]:
    shard_from_the_first_byte()
    return run(*configurations)


def run_both(whole: list[dict[str, Any]], sharded: list[dict[str, Any]]) -> None:
    run(*whole)
    run_sharded(*sharded)


def written_again(base: Path, source: Path, target: Path) -> list[str]:
    """Load a checkpoint and write it, at this world size; what is said where nodes do not share the folder: before
    training, and if it is another rank's later on.
    """
    import deepspeed

    from dora_dist import build_model
    from dora_dist.adapters.methods import chosen
    from dora_dist.checkpoint import state
    from dora_dist.checkpoint.adapter_of_model import Origin
    from dora_dist.checkpoint.format import load_checkpoint
    from dora_dist.checkpoint.saving import Saver
    from dora_dist.config import AdapterConfig, ModelConfig
    from dora_dist.runtime.errors import UserError

    shard_from_the_first_byte()
    adapter = AdapterConfig(method="full")
    model = build_model(ModelConfig(path=str(base), dtype="fp32"), adapter, deepspeed=SETTINGS).model
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained), config=SETTINGS)
    if dist.get_rank() > 0:
        del state.read_header  # rank 0 opens the files for all
    load_checkpoint(source, engine, model)
    origin = Origin(method=chosen(adapter), base_model=str(base))
    saver, said = Saver(engine, model, origin, run_dir=target.parent, timeout_s=60.0), []
    saver.save(target, {"step": 3}, {})
    saver.wait()
    saved = saver.ended()
    assert saved is not None and saved.failure is None, saved
    if dist.get_world_size() > 1:
        elsewhere = target.parent if dist.get_rank() == 0 else target.parent / "of-another-node"
        with pytest.raises(UserError) as error:
            Saver(engine, model, origin, run_dir=elsewhere, timeout_s=60.0)
        saver.save(elsewhere / "checkpoint-4", {"step": 4}, {})
        saver.wait()
        failed = saver.ended()
        assert failed is not None and failed.failure is not None
        said = [str(error.value), failed.failure]
    saver.close()
    return said


def disk_of_the_last_rank_is_full(raw: dict[str, Any]) -> str:
    shard_from_the_first_byte()
    if dist.get_rank() == dist.get_world_size() - 1:
        limit_file_size(20_000)
    return fails(raw)


def dies_while_it_writes(raw: dict[str, Any]) -> None:
    """Rank 0's process is gone once it has begun its part of the first checkpoint."""
    from dora_dist.checkpoint import state_writers

    begun = f".checkpoint-3.partial-*/.{state_file(0, 2)}.partial-*"

    def watch() -> None:
        while not list(Path(raw["checkpoint"]["run_dir"]).glob(begun)):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    shard_from_the_first_byte()
    state_writers.PIECE = 10  # thousands of writes: it is in the midst of them
    if dist.get_rank() == 0:
        threading.Thread(target=watch, daemon=True).start()
    run(raw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two ranks in both forms, and one that was killed in its first save and resumed."""
    folder = toy.training_folder(tmp_path_factory.mktemp("sharded"))
    with pytest.raises(RankError, match="rank 0 of 2: died"):
        run_ranks(dies_while_it_writes, 2, full(folder, "killed"))
    assert list((folder / "killed").glob(".checkpoint-3.partial-*/.state*")), "it was not in the midst of a save"
    assert run_folder.checkpoints(folder / "killed") == []
    whole = [full(folder, "whole"), dynamic(folder, "dynamic-whole")]
    sharded = [full(folder, "two"), dynamic(folder, "dynamic"), full(folder, "killed", "auto")]
    sharded += [full(folder, "again", str(folder / "two" / "checkpoint-3"))]
    run_ranks(run_both, 2, whole, sharded)
    return folder


def state(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    opened = open_state(folder / name / f"checkpoint-{step}")
    return {key: opened.read(key) for key in opened.entries}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("step", [3, 6])
def test_several_files_hold_what_one_would(folder: Path, step: int) -> None:
    checkpoint = folder / "two" / f"checkpoint-{step}"
    assert sorted(p.name for p in checkpoint.glob("state*")) == [state_file(0, 2), state_file(1, 2)]
    assert [p.name for p in (folder / "whole" / checkpoint.name).glob("state*")] == ["state.safetensors"]
    assert_same(state(folder, "two", step), state(folder, "whole", step))
    formats = [
        json.loads((folder / n / checkpoint.name / "manifest.json").read_text())["format"] for n in ("whole", "two")
    ]
    assert formats == [2, 3]


def test_a_merge_reads_several_files_as_one(folder: Path, tmp_path: Path) -> None:
    for name in ("two", "whole"):
        consolidate(folder / name / "checkpoint-6", folder / "base", tmp_path / name, progress=False)
    merged = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("two", "whole")]
    assert merged[0] == merged[1] != (folder / "base" / "model.safetensors").read_bytes()


def test_a_resumed_run_goes_on_bit_for_bit_also_after_one_that_was_killed_in_a_save(folder: Path) -> None:
    losses = metrics(folder / "two")["losses"]
    assert metrics(folder / "again")["losses"] == {step: losses[step] for step in (4, 5, 6)}
    assert_same(state(folder, "again", 6), state(folder, "two", 6))
    assert metrics(folder / "killed")["losses"] == losses
    assert_same(state(folder, "killed", 6), state(folder, "two", 6))
    assert not list((folder / "killed").glob(".checkpoint*"))


def test_an_adapter_that_was_pruned_is_the_same_in_both_forms(folder: Path) -> None:
    assert metrics(folder / "dynamic")["losses"] == metrics(folder / "dynamic-whole")["losses"]
    assert_same(state(folder, "dynamic", 6), state(folder, "dynamic-whole", 6))
    adapters = [(folder / n / "checkpoint-6/adapter/adapter_model.safetensors") for n in ("dynamic", "dynamic-whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_every_world_size_reads_what_another_wrote_and_writes_the_same(folder: Path, tmp_path: Path) -> None:
    source = folder / "two" / "checkpoint-3"
    for world, name in ((3, "three"), (1, "one")):
        said = run_ranks(written_again, world, folder / "base", source, folder / name / "checkpoint-3")
        assert len(list((folder / name / "checkpoint-3").glob("state-*"))) == world
        assert_same(state(folder, name, 3), state(folder, "two", 3))
        if world > 1:  # where a rank does not see rank 0's folder
            before, later = zip(*said, strict=True)
            assert all("checkpoint.run_dir: " in message and "all nodes share" in message for message in before)
            assert all("rank 1: checkpoint.run_dir" in message and "all nodes share" in message for message in later)
        assert [path.name for path in (folder / name).iterdir()] == ["checkpoint-3"]
        source = folder / name / "checkpoint-3"
    found, base = find_adapter(source)  # no run's configuration says what it is of
    assert base == str(folder / "base")
    consolidate(found, base, tmp_path / "merged", progress=False)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    masters = Masters(open_state(folder / "two" / "checkpoint-3"))
    assert all(torch.equal(tensors[name], masters[name]) for name in tensors)


def test_a_disk_that_is_full_on_one_rank_stops_all_and_leaves_nothing(folder: Path) -> None:
    for message in run_ranks(disk_of_the_last_rank_is_full, 2, full(folder, "disk")):
        assert "checkpoint-3 failed: rank 1: " in message
        assert f"{state_file(1, 2)}: cannot be written: File too large" in message
    assert [p.name for p in (folder / "disk").glob("*checkpoint*")] == []
    assert [p.name for p in (folder / "disk").glob(".checkpoint*")] == []
