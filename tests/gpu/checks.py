"""The checks of `make test-gpu`. Not test_*.py: pytest collects them only where `python -m tests.gpu` names this file.

Every test is a row of the report; what it noted (`record_property`) is the row's text.
"""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.analysis.decomposition import read_recordings
from dora_dist.checkpoint.state import open_state, state_file
from dora_dist.runtime.exit_codes import LOST_RANK
from tests import toy
from tests.conftest import ROOT
from tests.distributed.training_runs import config, metrics
from tests.gpu import recipes
from tests.gpu.machine import Machine, free_port, this_machine

Note = Callable[[str, object], None]

FP32 = 2e-4
"""Relative. Another device adds up in another order, which changes a loss in its seventh digit (as two CPU ranks do and
one: 1e-7). Adam divides every gradient by its own size, so those elements whose gradient is little but rounding move by
up to a whole learning rate the other way: that, over the steps here, may reach the fifth digit. Losses of models that
write text fall by 1e-2 and more in these runs, so a wrong gradient, or a step on stale values, is seen."""
BF16 = 2e-2
"""Relative: bf16 keeps 8 bits (4e-3), and two devices round differently at every layer."""


@pytest.fixture(scope="session")
def here() -> Machine:
    machine = this_machine()
    assert machine is not None, "start this by python -m tests.gpu"
    return machine


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipes.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    toy.write_records(folder / "data.json", 40)
    return folder


def result(results: dict[str, Any], name: str) -> dict[str, Any]:
    """One action's result; AssertionError with its traceback if it failed."""
    found: dict[str, Any] = results[name]
    assert not found.get("error"), found["error"]
    return found


def apart(found: list[float], expected: list[float]) -> float:
    """The largest relative difference between two lists of losses."""
    assert len(found) == len(expected) > 0 and all(map(math.isfinite, found)), (found, expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


# --- before training: the adapted model is the base ----------------------------------------------------------------

STARTS = {
    "llama": ("causal_lm", "fp32"),
    "llama in bf16": ("causal_lm", "bf16"),
    "bart": ("seq2seq_lm", "fp32"),
    **{f"{family}-classifier": ("sequence_classification", "fp32") for family in recipes.ENCODERS},
    **{f"llava-{tower}": ("image_text_to_text", "fp32") for tower in recipes.TOWERS},
}
SAME = {"fp32": 1e-5, "bf16": BF16}
"""Relative: another place in memory may mean another kernel, so logits need not be equal to the last bit."""


@pytest.fixture(scope="module")
def starts(here: Machine, models: Path, folder: Path) -> dict[str, Any]:
    actions = {
        name: {"do": "step_0", "base": models / name.split()[0], "task": task, "dtype": dtype}
        for name, (task, dtype) in STARTS.items()
    }
    return here.job(folder / "step-0.json", actions)


@pytest.mark.parametrize("name", STARTS)
def test_step_0_logits_are_the_bases(starts: dict[str, Any], name: str, record_property: Note) -> None:
    found = result(starts, name)
    record_property("", "equal bit for bit" if found["equal"] else f"off by {found['off_by']:.1e}")
    assert found["off_by"] <= SAME[STARTS[name][1]]


# --- six steps here and on the CPU ---------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "training.max_steps": 6,
    "training.learning_rate": 1e-2,
    "adapter.dropout": 0,  # its random numbers are a device's own
    "adapter.dynamic_rank": "false",  # which of two near-equal components goes is a matter of rounding
    "model.dtype": "fp32",
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama7b_dora", PLAIN),
    "llama in bf16": ("llama7b_dora", {**PLAIN, "model.dtype": "bf16"}),
    **{name: ("glue_sst2", {**PLAIN, "model.path": name}) for name in recipes.ENCODERS},
    "roberta on questions": ("squad", PLAIN),
    "bart": ("xsum", PLAIN),
    **{f"llava-{name}": ("llava7b_dora", {**PLAIN, "model.path": f"llava-{name}"}) for name in recipes.TOWERS},
}


@pytest.fixture(scope="module")
def trained(here: Machine, models: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same runs here and on one CPU rank."""
    found = []
    for ranks in (here, Machine("cpu", 1)):
        actions = {}
        for name, (recipe, fields) in RUNS.items():
            run_dir = folder / f"{name}-{ranks.device}-{ranks.ranks}"
            if "model.path" in fields:
                fields = {**fields, "model.path": models / fields["model.path"]}
            actions[name] = recipes.scaled(recipe, models, run_dir, here.ranks, **fields)
        found.append(ranks.job(folder / f"losses-{ranks.device}-{ranks.ranks}.json", actions))
    return found[0], found[1]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_one_cpu_rank(
    trained: tuple[dict[str, Any], dict[str, Any]], name: str, record_property: Note
) -> None:
    ours, cpus = (result(results, name)["losses"] for results in trained)
    record_property("", f"{len(ours)} losses within {apart(ours, cpus):.1e}, last {ours[-1]:.4f}")
    assert apart(ours, cpus) <= (BF16 if "bf16" in name else FP32)


# --- every recipe --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe_runs(here: Machine, models: Path, folder: Path) -> dict[str, Any]:
    scaled = {name: recipes.scaled(name, models, folder / name, here.ranks) for name in recipes.RECIPES}
    return here.job(folder / "recipes.json", scaled)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipe_scaled_down(recipe_runs: dict[str, Any], name: str, record_property: Note) -> None:
    found = result(recipe_runs, name)
    assert len(found["losses"]) == recipes.STEPS and all(map(math.isfinite, found["losses"] + found["evaluated"]))
    recipe = json.loads((recipes.CONFIGS / f"{name}.json").read_text())
    assert bool(found["evaluated"]) == ("eval_every" in recipe["training"])
    if recipe["adapter"].get("dynamic_rank"):
        assert found["kept"] and found["kept"][-1] < found["kept"][0] and found["compacted"]
    kept = f", components {found['kept'][0]:,} to {found['kept'][-1]:,}, compacted" if found["kept"] else ""
    record_property("", f"loss {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}{kept}")


# --- one run in many ways: resumed, under engine options, merged, evaluated ------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "offload_param": {"offload_param": "cpu"},
    "offload_optimizer": {"offload_optimizer": "cpu"},
    "both offloaded": {"offload_param": "cpu", "offload_optimizer": "cpu"},
    "nothing persistent": {"param_persistence_threshold": 0},
    "all persistent": {"param_persistence_threshold": 10**9},
    "sequential gathers": {"allgather_sequential": True, "prefetch_bucket_size": 0},
    "hpZ": {"hpz_partition_size": 2},
}


WIDE = {"r": 64}
"""More numbers on each rank than the 4,096 below which bitsandbytes keeps moments in fp32."""


SELECTIVE = {"activation_checkpointing": "selective"}
SHARDED = {"param_persistence_threshold": 0}
"""Or small weights stay gathered, whatever is recomputed."""
PACKED = ("int8", "nf4")


def toy_run(here: Machine, models: Path, folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """An action: six steps in fp32, with checkpoints and recordings after the third and the last."""
    changes["training"] = {"global_batch_size": max(8, here.ranks), **changes.get("training", {})}
    changes["engine"] = {"reduce_bucket_size": 100_000, **changes.get("engine", {})}
    raw = config(models / "llama", folder / "data.json", folder / name, analysis={"every": 3}, **changes)
    raw["model"]["attn_implementation"] = "eager"  # flash attention's backward adds up in no fixed order
    return {"do": "train", "config": raw}


@pytest.fixture(scope="module")
def runs(here: Machine, models: Path, folder: Path) -> dict[str, Any]:
    action = partial(toy_run, here, models, folder)
    pruned = {"dynamic_rank": True, "prune_every": 1}
    actions = {
        "plain": action("plain"),
        "resumed": action("resumed", checkpoint={"resume": str(folder / "plain" / "checkpoint-3")}),
        "sharded": {**action("sharded"), "do": "train_sharded"},
        "sharded, resumed": {
            **action("sharded, resumed", checkpoint={"resume": str(folder / "sharded" / "checkpoint-3")}),
            "do": "train_sharded",
        },
        "wide": action("wide", adapter=WIDE),
        "wide, 8 bits": action("wide, 8 bits", adapter=WIDE, training={"optimizer": "adamw_8bit"}),
        "selective": action("selective", training=SELECTIVE, engine=SHARDED),
        **{name: action(name, model={"storage": name}) for name in PACKED},
        **{
            f"{name}, selective": action(
                f"{name}, selective", model={"storage": name}, training=SELECTIVE, engine=SHARDED
            )
            for name in PACKED
        },
        "pruned": action("pruned", adapter=pruned),
        "pruned and offloaded": action("pruned and offloaded", adapter=pruned, engine=OPTIONS["both offloaded"]),
    }
    possible = [name for name in OPTIONS if name != "hpZ" or here.ranks % 2 == 0]
    return here.job(folder / "runs.json", actions | {name: action(name, engine=OPTIONS[name]) for name in possible})


def test_a_resumed_run_is_the_uninterrupted_one(runs: dict[str, Any], record_property: Note) -> None:
    plain, resumed = result(runs, "plain")["losses"], result(runs, "resumed")["losses"]
    record_property("", f"3 losses within {apart(resumed, plain[3:]):.0e}")
    assert resumed == plain[3:]


def test_a_checkpoint_that_every_rank_writes_holds_what_rank_0s_does(
    here: Machine, runs: dict[str, Any], folder: Path, record_property: Note
) -> None:
    plain = result(runs, "plain")["losses"]
    assert result(runs, "sharded")["losses"] == plain and result(runs, "sharded, resumed")["losses"] == plain[3:]
    one, *several = (open_state(folder / name / "checkpoint-6") for name in ("plain", "sharded", "sharded, resumed"))
    for state in several:
        assert state.entries.keys() == one.entries.keys()
        assert all(torch.equal(state.read(name), one.read(name)) for name in one.entries)
    files = sorted(path.name for path in (folder / "sharded" / "checkpoint-6").glob("state*"))
    assert files == [state_file(rank, here.ranks) for rank in range(here.ranks)]
    record_property("", f"{len(one.entries)} tensors in {len(files)} files, equal bit for bit")


@pytest.mark.parametrize("name", OPTIONS)
def test_engine_option(runs: dict[str, Any], name: str, record_property: Note) -> None:
    if name not in runs:
        record_property("", "not run: needs an even number of GPUs")
        return
    difference = apart(result(runs, name)["losses"], result(runs, "plain")["losses"])
    record_property("", f"losses within {difference:.1e} of the plain run's")
    assert difference <= FP32


@pytest.mark.parametrize("storage", [None, *PACKED])
def test_kept_outputs_change_no_loss(runs: dict[str, Any], storage: str | None, record_property: Note) -> None:
    names = ("plain", "selective") if storage is None else (storage, f"{storage}, selective")
    difference = apart(*(result(runs, name)["losses"] for name in names))
    record_property("", f"losses within {difference:.1e} of those without checkpointing")
    assert difference <= FP32


@pytest.mark.parametrize("storage", PACKED)
def test_packed_weights_train_alike(runs: dict[str, Any], storage: str, record_property: Note) -> None:
    expected, found = result(runs, "plain")["losses"], result(runs, storage)["losses"]
    difference = apart(found, expected)
    record_property("", f"losses within {difference:.1e} of those on the weights as they are")
    assert found != expected and difference <= {"int8": BF16, "nf4": 0.1}[storage]


def test_moments_in_8_bits_train_alike_and_are_saved(runs: dict[str, Any], folder: Path, record_property: Note) -> None:
    expected, found = result(runs, "wide")["losses"], result(runs, "wide, 8 bits")["losses"]
    difference = apart(found, expected)
    record_property("", f"losses within {difference:.1e} of those with moments in fp32")
    assert found != expected and difference <= BF16
    eight, whole = (open_state(folder / name / "checkpoint-6") for name in ("wide, 8 bits", "wide"))
    names = [name for name in whole.entries if name.endswith(".exp_avg")]
    ours, theirs = (torch.cat([state.read(name).flatten() for name in names]) for state in (eight, whole))
    assert (ours - theirs).norm() < 0.2 * theirs.norm()


def test_what_is_recorded_does_not_depend_on_where_weights_are(
    runs: dict[str, Any], folder: Path, record_property: Note
) -> None:
    assert result(runs, "plain") and result(runs, "both offloaded")
    plain, offloaded = (
        [
            (moved.delta_m or 0.0, moved.delta_d or 0.0)
            for recording in read_recordings(folder / name / "analysis.jsonl")
            for moved in recording.matrices.values()
        ]
        for name in ("plain", "both offloaded")
    )
    record_property("", f"{len(plain)} matrices, ΔM up to {max(m for m, _ in plain):.2g}")
    for found, expected in zip(offloaded, plain, strict=True):
        assert min(expected) > 0 and found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["pruned", "pruned and offloaded"])
def test_dynamic_rank_ends_at_its_budget_and_is_compacted(
    runs: dict[str, Any], name: str, record_property: Note
) -> None:
    found = result(runs, name)
    record_property("", f"components {found['kept'][0]} to {found['kept'][-1]}")
    assert found["compacted"] and found["kept"][-1] == 4 * 8  # r of each of four matrices in two layers
    assert apart(found["losses"], result(runs, "pruned")["losses"]) <= FP32


def test_merged_unmerged_and_evaluation(
    here: Machine, runs: dict[str, Any], recipe_runs: dict[str, Any], models: Path, folder: Path, record_property: Note
) -> None:
    output, asked = folder / "merged", models / "conversations" / "asked.json"
    records = json.loads((models / "conversations" / "data.json").read_text())
    pictures = [r for r in records if isinstance(r.get("image"), str)]
    asked.write_text(json.dumps([{**r, "text": r["conversations"][0]["value"], "answer": "red"} for r in pictures]))
    likely = {"do": "evaluate", "tasks": {"boolq": folder / "data.json"}, "mode": "likelihood", "dtype": "fp32"}
    actions = {
        "merged": {"do": "merged", "run_dir": folder / "plain", "base": models / "llama", "output": output},
        "adapter": {**likely, "model_path": folder / "plain"},
        "model": {**likely, "model_path": output},
        "generated": {"do": "evaluate", "model_path": output, "tasks": {"boolq": folder / "data.json"}},
        "llava": {"do": "evaluate", "model_path": folder / "llava7b_dora", "tasks": {"asked": asked}},
        **{
            name: {"do": "evaluate", "model_path": folder / name, "tasks": {"dev": folder / f"{name}-data.json"}}
            for name in ("squad", "xsum", "glue_sst2")
        },
    }
    found = here.job(folder / "evaluation.json", actions, launcher=False)
    merged = result(found, "merged")
    record_property("", f"logits within {merged['merged']:.1e}, the base's are {merged['base']:.2f} off")
    assert merged["device"] == here.device
    assert merged["merged"] <= 1e-4 and merged["base"] > 1e-2
    assert result(found, "adapter")["boolq"]["correct"] == result(found, "model")["boolq"]["correct"]
    assert result(found, "generated")["boolq"]["total"] == 40
    assert len(result(found, "llava")["asked"]["predictions"]) == len(pictures)
    for name in ("squad", "xsum", "glue_sst2"):  # alone, the best checkpoint has the loss that its ranks saw
        loss = result(found, name)["dev"]["loss"]
        assert any(math.isclose(loss, seen, rel_tol=FP32) for seen in recipe_runs[name]["evaluated"]), name


# --- as a user types it --------------------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(
    here: Machine, models: Path, folder: Path, record_property: Note
) -> None:
    steps, last = 300 if here.on_gpu else 40, here.ranks - 1
    changes: dict[str, dict[str, Any]] = {
        "training": {"max_steps": steps, "schedule": "constant"},
        "checkpoint": {"save_every": 5},
        "engine": {"step_timeout_s": 60.0},
    }
    for name in ("undisturbed", "killed"):
        action = toy_run(here, models, folder, name, **changes)
        (folder / f"{name}.json").write_text(json.dumps(action["config"]))
    here.launch("launch/train.py", "--config", folder / "undisturbed.json")
    ranks = start_ranks(here, folder / "killed.json")
    try:
        while steps_done(folder / "killed") < 8:
            assert all(process.poll() is None for process in ranks), (folder / "rank-0.log").read_text()
            time.sleep(0.01)
        ranks[last].kill()
        codes = [process.wait(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = (folder / "rank-0.log").read_text()
    assert codes == [LOST_RANK] * last + [-signal.SIGKILL] and (not last or f"lost rank {last}" in said), said
    here.launch("launch/train.py", "--config", folder / "killed.json", "--resume")
    found, expected = (metrics(folder / name)["losses"] for name in ("killed", "undisturbed"))
    difference = apart(list(found.values()), list(expected.values()))
    others = f"the {last} others name it and end with {LOST_RANK}" if last else "there are no others"
    record_property("", f"{others}; the resumed run is within {difference:.1e}")
    assert list(found) == list(range(1, steps + 1)) and difference <= FP32


def start_ranks(here: Machine, file: Path) -> list[subprocess.Popen[bytes]]:
    """`dora-dist train` on ranks of their own, without a launcher that would end them by itself."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(here.ranks))
    command = [sys.executable, "-m", "dora_dist", "train", "--config", str(file)]
    ranks = []
    for rank in range(here.ranks):
        own = here.environment | common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        with file.with_name(f"rank-{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=subprocess.STDOUT))
    return ranks


def steps_done(run_dir: Path) -> int:
    try:
        return max(metrics(run_dir)["losses"], default=0)
    except (OSError, ValueError):
        return 0


# --- benchmarks ----------------------------------------------------------------------------------------------------

SMALL = "--hidden 64 --ffn 96 --heads 4 --layers 2 --tokens 32 --r 4 --vocab 50 --warmup 1 --steps 2"
"""For the rehearsal, where the default sizes (two layers of LLaMA-7B) would take minutes."""


def test_benchmark_of_steps(here: Machine, folder: Path, record_property: Note) -> None:
    sizes = [] if here.on_gpu else SMALL.split()
    here.run(sys.executable, "benchmarks/step.py", "--rounds", 1, *sizes, "--output", folder / "bench")
    report = json.loads((folder / "bench" / "step.json").read_text())
    for name, entry in report["variants"].items():
        assert (entry["peak_device_bytes"] is not None) == here.on_gpu
        peak = (entry["peak_device_bytes"] or entry["peak_rss_bytes"]) / 1e9
        record_property(name, f"{entry['median_seconds']:.4f} s, {peak:.2f} GB")
    assert report["settings"]["ranks"] == here.ranks


def test_benchmark_of_saves(here: Machine, folder: Path, record_property: Note) -> None:
    sizes = [] if here.on_gpu else ["--millions", 1, "--saves", 2]
    here.run(sys.executable, "benchmarks/save.py", *sizes, "--output", folder / "bench")
    found = json.loads((folder / "bench" / "save.json").read_text())
    stall = sorted(found["stall_s"])[len(found["stall_s"]) // 2]
    record_property("", f"{found['bytes'] / 1e6:,.0f} MB; training stands still for {stall:.3f} s")
