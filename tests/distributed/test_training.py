"""Whole runs on real ranks: the losses do not know how many ranks there are, nor whether a run was interrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.manifest import read_manifest
from tests import toy
from tests.distributed.training_runs import config, fails, run
from tests.ranks import RankError, run_ranks

SELECTIVE = {"activation_checkpointing": "selective"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    return toy.training_folder(folder)  # 20 to train on: the fourth global batch of an epoch has 2


def toy_config(folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    return config(folder / "base", folder / "data.json", folder / name, **changes)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    """The same six steps in many ways; every entry is rank 0's metrics."""
    with_eval = {"eval_every": 3}
    one = run_ranks(
        run,
        1,
        toy_config(folder, "one", training=with_eval),
        toy_config(folder, "checkpointed", training={"activation_checkpointing": True}),
        toy_config(folder, "micro6", training={"micro_batch_size": 6}),
        toy_config(folder, "dropout", adapter={"dropout": 0.3}),
        toy_config(folder, "lora", adapter={"weight_decomposed": False}),
    )[0]
    two = run_ranks(
        run,
        2,
        toy_config(folder, "two", training=with_eval),
        toy_config(
            folder,
            "two-micro3",
            training={"micro_batch_size": 3, "activation_checkpointing": True, "recompute_all": True},
        ),
        toy_config(folder, "two-selective", training=SELECTIVE, engine={"param_persistence_threshold": 0}),
        toy_config(folder, "two-again", checkpoint={"resume": str(folder / "two" / "checkpoint-3")}),
        toy_config(folder, "two-from-one", checkpoint={"resume": str(folder / "one" / "checkpoint-3")}),
        toy_config(folder, "dropout-again", adapter={"dropout": 0.3}),
        toy_config(
            folder,
            "dropout-resumed",
            adapter={"dropout": 0.3},
            checkpoint={"resume": str(folder / "dropout-again" / "checkpoint-3")},
        ),
        toy_config(folder, "magnitude-bf16", model={"dtype": "bf16"}, training={"learning_rate": 1e-4}),
    )[0]
    three = run_ranks(
        run,
        3,
        toy_config(folder, "three", training={"micro_batch_size": 2}),
        toy_config(folder, "three-from-two", checkpoint={"resume": str(folder / "two" / "checkpoint-3")}),
    )[0]
    elastic = []
    for ranks, last_step in ((2, 2), (1, 3), (3, 5), (2, 6)):  # 3 ranks do not divide a batch of 4
        elastic = run_ranks(run, ranks, toy_config(folder, "elastic", **elastic_changes(last_step)))[0]
    [undisturbed] = run_ranks(run, 2, toy_config(folder, "undisturbed", **elastic_changes(6)))[0]
    names = ["one", "checkpointed", "micro6", "dropout", "lora"]
    names += [
        "two",
        "two-micro3",
        "two-selective",
        "two-again",
        "two-from-one",
        "dropout-again",
        "dropout-resumed",
        "magnitude-bf16",
    ]
    names += ["three", "three-from-two"]
    names += ["elastic", "undisturbed"]
    return dict(zip(names, [*one, *two, *three, *elastic, undisturbed], strict=True))


def elastic_changes(max_steps: int) -> dict[str, dict[str, Any]]:
    """Up to a step of six with a constant learning rate, which does not know where the run will end."""
    training = {"global_batch_size": 4, "max_steps": max_steps, "schedule": "constant", "micro_batch_size": 2}
    return {"training": training, "checkpoint": {"resume": "auto"}}


def losses(runs: dict[str, Any], name: str, first: int = 1) -> list[float]:
    return [runs[name]["losses"][step] for step in range(first, 7)]


def test_the_model_learns(runs: dict[str, Any]) -> None:
    assert losses(runs, "one")[-1] < losses(runs, "one")[0] - 0.05


@pytest.mark.parametrize("other", ["checkpointed", "micro6", "two", "two-micro3", "two-selective", "three"])
def test_same_losses_whatever_the_ranks_accumulation_or_checkpointing(runs: dict[str, Any], other: str) -> None:
    assert losses(runs, other) == pytest.approx(losses(runs, "one"), abs=1e-5)


def test_evaluation_does_not_know_the_world_size(runs: dict[str, Any]) -> None:
    assert set(runs["one"]["eval"]) == {3, 6}
    assert runs["two"]["eval"] == pytest.approx(runs["one"]["eval"], abs=1e-5)


def test_a_resumed_run_has_exactly_the_losses_of_an_uninterrupted_one(runs: dict[str, Any]) -> None:
    assert losses(runs, "two-again", 4) == losses(runs, "two", 4)
    assert losses(runs, "dropout-resumed", 4) == losses(runs, "dropout-again", 4)
    assert min(runs["two-again"]["losses"]) == 4


@pytest.mark.parametrize("other", ["two-from-one", "three-from-two"])
def test_a_run_goes_on_at_another_world_size(runs: dict[str, Any], other: str) -> None:
    assert losses(runs, other, 4) == pytest.approx(losses(runs, "one", 4), abs=1e-5)


def test_a_run_that_goes_from_two_ranks_to_one_to_three_to_two_is_the_same_run(runs: dict[str, Any]) -> None:
    assert list(runs["elastic"]["losses"]) == [1, 2, 3, 4, 5, 6]
    assert losses(runs, "elastic") == pytest.approx(losses(runs, "undisturbed"), abs=1e-5)


def test_dropout_and_the_magnitude_make_a_difference(runs: dict[str, Any]) -> None:
    assert losses(runs, "dropout") != pytest.approx(losses(runs, "one"), abs=1e-4)
    assert losses(runs, "lora") != pytest.approx(losses(runs, "one"), abs=1e-4)


def test_the_magnitude_moves_in_bf16(runs: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(folder / "magnitude-bf16" / "checkpoint-6" / "state.safetensors")
    offsets = [t for name, t in state.items() if name.endswith("magnitude_offset.master")]
    assert len(offsets) == 8
    assert all((o != 0).float().mean() > 0.9 for o in offsets)


def test_a_checkpoint_holds_what_trains_and_nothing_of_the_base(runs: dict[str, Any], folder: Path) -> None:
    from safetensors import safe_open

    checkpoint = folder / "two" / "checkpoint-6"
    with safe_open(checkpoint / "state.safetensors", "pt") as state:
        names = [name.split(".") for name in state.offset_keys()]
        assert {name[-2] for name in names} == {"lora_A", "lora_B", "magnitude_offset"}
        assert {name[-1] for name in names} == {"master", "exp_avg", "exp_avg_sq"}
    assert not list(checkpoint.rglob("*.pt")) + list(checkpoint.rglob("*.bin")) + list(checkpoint.rglob("*.pth"))
    card = (checkpoint / "adapter" / "README.md").read_text()
    assert "for 6 optimizer steps" in card and "with DoRA" in card and str(folder) not in card


def test_merged_unmerged_and_peft_give_the_same_logits(runs: dict[str, Any], folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dora_dist.checkpoint.consolidate import consolidate
    from dora_dist.evaluation.inference import load_for_inference

    adapter = folder / "two" / "checkpoint-6" / "adapter"
    consolidate(adapter, folder / "base", folder / "merged", progress=False)
    ids = toy.tokens()
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)(ids).logits
    unmerged = load_for_inference(str(folder / "two"), dtype="fp32")[0](ids).logits
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    plain = base(ids).logits
    peft = PeftModel.from_pretrained(base, str(adapter))(ids).logits
    assert (merged - unmerged).abs().max() <= 1e-4
    assert (peft - unmerged).abs().max() <= 1e-4
    assert (plain - unmerged).abs().max() > 1e-2


def test_a_run_can_start_from_a_peft_folder(runs: dict[str, Any], folder: Path) -> None:
    start = {"init_from": str(folder / "one" / "checkpoint-6" / "adapter")}
    [continued] = run_ranks(run, 1, toy_config(folder, "continued", adapter=start, training={"max_steps": 1}))[0]
    # Step 7 of the first run would see the same batch as step 3 (20 samples make 4 batches): well below the start.
    assert continued["losses"][1] < losses(runs, "one")[0] - 0.05


def test_no_checkpoint_beyond_keep_last_stays(runs: dict[str, Any], folder: Path) -> None:
    assert [c.name for c in run_folder.checkpoints(folder / "two")] == ["checkpoint-3", "checkpoint-6"]
    run_folder.retire(folder / "two-micro3", keep_last=1)
    assert [c.name for c in run_folder.checkpoints(folder / "two-micro3")] == ["checkpoint-6"]


# --- what goes wrong must go wrong on every rank ------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_every_rank(folder: Path) -> None:
    raw = toy_config(folder, "nan", training={"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0.0})
    messages = run_ranks(fails, 2, raw)
    assert all("the loss became" in m and "learning_rate" in m for m in messages)
    assert json.loads((folder / "nan" / "not_finite.json").read_text())["step"] >= 1
    assert not list((folder / "nan").glob("checkpoint-*"))


def test_a_gradient_that_is_not_finite_stops_every_rank_though_the_loss_is(folder: Path) -> None:
    # The penalty on the variance of components acts on gradients alone.
    raw = toy_config(folder, "infinite", adapter={"dynamic_rank": True, "dem_weight": 1e43, "prune_every": 1})
    messages = run_ranks(fails, 2, raw)
    assert ["optimizer step 1: the loss is finite, but its gradient is not" in m for m in messages] == [True, True], (
        messages
    )
    recorded = json.loads((folder / "infinite" / "not_finite.json").read_text())
    assert recorded["step"] == 1
    assert [len(samples) for samples in recorded["first_tokens_by_rank"]] == [3, 3]
    assert not list((folder / "infinite").glob("checkpoint-*"))


def test_a_checkpoint_of_another_model_or_position_is_refused(runs: dict[str, Any], folder: Path) -> None:
    resume = {"resume": str(folder / "two" / "checkpoint-3")}
    other_adapter = toy_config(folder, "x1", checkpoint=resume, adapter={"r": 5})
    assert all("was written with adapter.r = 4, this run has 5" in m for m in run_ranks(fails, 2, other_adapter))
    toy.base_model(folder / "base2", initializer_range=0.05)
    other_base = toy_config(folder, "x2", checkpoint=resume, model={"path": str(folder / "base2")})
    other_batch = toy_config(folder, "x3", checkpoint=resume, training={"global_batch_size": 4})
    damaged = folder / "damaged" / "checkpoint-3"
    shutil.copytree(folder / "two" / "checkpoint-3", damaged)
    with (damaged / "state.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    broken = toy_config(folder, "x4", checkpoint={"resume": str(damaged)})
    other_alpha = toy_config(folder, "x5", checkpoint=resume, adapter={"lora_alpha": 9.0})
    fewer_layers = toy_config(folder, "x6", checkpoint=resume, adapter={"target_modules": ["q_proj"]})
    [(base, batch, checksum, alpha, layers)] = run_ranks(
        fail_all, 1, [other_base, other_batch, broken, other_alpha, fewer_layers]
    )
    assert "was trained on another base: the weights in model.path" in base
    assert "training.global_batch_size = 6, this run has 4" in batch
    assert "state.safetensors is damaged" in checksum
    assert "was written with adapter.lora_alpha = 8.0, this run has 9.0" in alpha
    assert "another model or adapter: 'model.layers.0.mlp.down_proj.lora_A' is [" in layers


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGE = {
    "state.safetensors": flip_a_bit,
    "adapter/adapter_model.safetensors": flip_a_bit,
    "trainer_state.json": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "adapter/adapter_config.json": lambda file: file.unlink(),
    "optimizer.pt": lambda file: file.write_bytes(b"not ours"),
    "manifest.json": lambda file: file.write_bytes(file.read_bytes()[:40]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name_and_auto_takes_the_checkpoint_before(
    runs: dict[str, Any], folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dora_dist.runtime.errors import UserError

    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(folder / "two" / checkpoint, tmp_path / checkpoint)
    DAMAGE[name](tmp_path / "checkpoint-6" / name)
    with pytest.raises(UserError, match=f"checkpoint-6.*{Path(name).name}"):
        read_manifest(tmp_path / "checkpoint-6")
    assert run_folder.newest_intact(tmp_path) == tmp_path / "checkpoint-3"
    printed = capsys.readouterr().err
    assert "warning" in printed and Path(name).name in printed and "checkpoint-6.damaged" in printed
    assert run_folder.newest_intact(tmp_path) == tmp_path / "checkpoint-3"
    assert capsys.readouterr().err == ""
    run_folder.retire(tmp_path, keep_last=1)
    assert [c.name for c in run_folder.checkpoints(tmp_path)] == ["checkpoint-3"]


def fail_all(raws: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(fails(raw) for raw in raws)


def test_a_run_folder_that_is_in_use_is_refused(runs: dict[str, Any], folder: Path) -> None:
    messages = run_ranks(fails, 2, toy_config(folder, "two"))
    assert all("already holds a run" in m and "--checkpoint.resume auto" in m for m in messages)


def test_a_disk_that_is_full_stops_every_rank_and_leaves_nothing_half_written(folder: Path) -> None:
    raw = toy_config(folder, "full", analysis={"every": 1})
    first, second = run_ranks(fails_where_nothing_can_be_written, 2, raw)
    for what, file, on_first, on_second in zip(
        ("run folder", "analysis"), ("log", "analysis"), first, second, strict=False
    ):
        assert f"gone/{file}: cannot be written: No such file" in on_first
        assert f"writing the {what} failed on rank 0: " in on_second and on_first in on_second
    assert all("cannot be written" in messages[2] for messages in (first, second))
    assert [p.name for p in (folder / "full").glob("*checkpoint*")] == []


LINES: dict[str, dict[str, dict[str, Any]]] = {
    "of an evaluation": {"training": {"eval_every": 1}},
    "of a pruning": {"adapter": {"dynamic_rank": True, "prune_every": 1}},
    "of a save": {"checkpoint": {"save_every": 1}},
    "the rank map": {"adapter": {"dynamic_rank": True, "prune_every": 1}},
}
"""What rank 0 writes besides losses, by runs that write it first."""


def test_whatever_rank_0_cannot_write_stops_every_rank(folder: Path) -> None:
    runs = [
        toy_config(folder, f"unwritten {name}", logging={"every": 100}, **{"training": {"max_steps": 4}, **changes})
        for name, changes in LINES.items()
    ]
    picture = Path(runs[-1]["checkpoint"]["run_dir"]) / "rank_map.png"
    picture.mkdir(parents=True)
    first, second = run_ranks(fails_with_a_log_that_is_full, 2, *runs)
    for on_first, on_second in zip(first[:-1], second[:-1], strict=True):
        assert on_first.startswith("/dev/full: cannot be written: No space left")
        assert on_second == f"writing the log failed on rank 0: {on_first}"
    assert f"drawing the rank map failed: [Errno 21] Is a directory: '{picture}'" in first[-1]
    assert second[-1] == f"drawing the rank map failed on rank 0: {first[-1]}"


def fails_with_a_log_that_is_full(*runs: dict[str, Any]) -> list[str]:
    """As `fails`, of each; the last one has a log that is not."""
    from dora_dist.checkpoint.history import History

    add = History.add

    def add_where_it_is_full(history: History, event: str, **fields: Any) -> Any:
        if event not in ("start", "model"):
            history._file = Path("/dev/full")
        return add(history, event, **fields)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(History, "add", add_where_it_is_full)
        said = [fails(raw) for raw in runs[:-1]]
    return [*said, fails(runs[-1])]


def test_a_save_that_fails_can_be_gone_on_without(folder: Path) -> None:
    raw = toy_config(folder, "continue", checkpoint={"save_every": 2, "on_failure": "continue"})
    run_ranks(without_space_at_first, 2, raw)
    lines = run_folder.metrics(folder / "continue")
    failed = [line["step"] for line in lines if line.get("save_failed")]
    saved = [line["step"] for line in lines if "save_stall_seconds" in line]
    assert failed and min(failed) < min(saved)
    assert sorted(line["step"] for line in lines if "loss" in line) == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in sorted((folder / "continue").glob("*checkpoint*"))][-1] == "checkpoint-6"
    assert not (folder / "continue" / "checkpoint-2").exists()


def without_space_at_first(raw: dict[str, Any]) -> None:
    """Run with files limited to 20 kB until a save has failed."""
    import resource
    import threading
    import time

    limit_file_size(20_000)

    def lift_the_limit() -> None:
        log = Path(raw["checkpoint"]["run_dir"]) / "metrics.jsonl"
        while not (log.exists() and "save_failed" in log.read_text()):
            time.sleep(0.001)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    threading.Thread(target=lift_the_limit, daemon=True).start()
    run(raw)


def fails_where_nothing_can_be_written(raw: dict[str, Any]) -> list[str]:
    """As `fails`: without the folder of the log, of the analysis, and with files limited to 20 kB, of which the kernel
    refuses the rest, as it does on a full disk."""
    from dora_dist.checkpoint import history
    from dora_dist.training import recording

    said = []
    for module, name, file in ((history, "METRICS", "gone/log"), (recording, "ANALYSIS", "gone/analysis")):
        elsewhere = {**raw["checkpoint"], "run_dir": f"{raw['checkpoint']['run_dir']}-{name}"}
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(module, name, file)
            said.append(fails({**raw, "checkpoint": elsewhere}))
    limit_file_size(20_000)
    return [*said, fails(raw)]


def limit_file_size(size: int) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write itself fails, with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_rank_that_raises_is_reported(folder: Path) -> None:
    with pytest.raises(RankError, match="no such"):
        run_ranks(run, 1, toy_config(folder, "absent", model={"path": str(folder / "nowhere")}))
