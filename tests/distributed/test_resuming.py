"""Resumed with other settings: what is followed takes effect, in numbers, and what is finished is left alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_dist.analysis.decomposition import read_recordings
from dora_dist.checkpoint import run_folder
from dora_dist.cli import main
from tests import toy
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks

WAS = {"learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0}
LINEAR = {"schedule": "linear", "max_steps": 6, "warmup_steps": 1}
WITH_PAGE: dict[str, dict[str, Any]] = {"logging": {"report": True}, "analysis": {"every": None}}
FOLLOWED: dict[str, dict[str, dict[str, Any]]] = {
    "unchanged": {},
    "rate": {"training": {"learning_rate": 0.02}},
    "schedule": {"training": {"schedule": "cosine", "max_steps": 8}},
    "decay": {"training": {"weight_decay": 0.5}},
    "clipping": {"training": {"max_grad_norm": 1e-3}},
    "beta1": {"training": {"adam_beta1": 0.5}},
    "micro": {"training": {"micro_batch_size": 3}},
    "dropout": {"adapter": {"dropout": 0.5}},
    "norms": {"adapter": {"norm_gradient": "full"}},
    "dtype": {"model": {"dtype": "bf16"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy.training_folder(tmp_path_factory.mktemp("resuming"))
    toy.write_records(folder / "validation.json", 6)
    return folder


def described(folder: Path, name: str, resume: str | None = None, **changes: dict[str, Any]) -> dict[str, Any]:
    """Steps up to 5, saved every 3, at a constant rate; `resume` is a checkpoint in the folder, or auto."""
    place = resume if resume in (None, "auto") else str(folder / resume)
    changes["training"] = {**WAS, "max_steps": 5, **changes.get("training", {})}
    changes["checkpoint"] = {"resume": place, **changes.get("checkpoint", {})}
    return config(folder / "base", folder / "data.json", folder / name, **changes)


@pytest.fixture(scope="module")
def runs(folder: Path) -> None:
    """All runs of this file, on one rank."""
    run_ranks(
        run,
        1,
        described(folder, "first", analysis={"every": 2}),  # the runs that go on from it record nothing
        *(described(folder, name, "first/checkpoint-3", **changes) for name, changes in FOLLOWED.items()),
        described(folder, "decaying", training={**LINEAR, "max_steps": 3}, analysis={"every": 2}),
        described(folder, "decaying", "auto", training=LINEAR, analysis={"every": 2, "modules": ["q_proj"]}),
        described(folder, "uninterrupted", training={**LINEAR, "eval_every": 4}, **WITH_PAGE),
        described(folder, "often", "first/checkpoint-3", training={"eval_every": 1}, checkpoint={"save_every": 1}),
    )


def log(folder: Path, name: str, key: str) -> dict[int, float]:
    lines = run_folder.metrics(folder / name)
    return {line["step"]: line[key] for line in lines if key in line}


def test_extending_a_run_takes_the_schedule_of_the_longer_one_and_wastes_no_step(runs: None, folder: Path) -> None:
    rates = log(folder, "decaying", "learning_rate")
    longer = log(folder, "uninterrupted", "learning_rate")
    assert [rates[step] for step in (4, 5, 6)] == [longer[step] for step in (4, 5, 6)]
    before, after = (moved(folder, "decaying", step) for step in (3, 6))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert set(log(folder, "decaying", "loss")) == {1, 2, 3, 4, 5, 6}


def moved(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    state = load_file(folder / name / f"checkpoint-{step}" / "state.safetensors")
    return {key: values for key, values in state.items() if key.endswith(".master")}


def test_an_unchanged_run_goes_on_bit_for_bit(runs: None, folder: Path) -> None:
    ours, theirs = moved(folder, "unchanged", 5), moved(folder, "first", 5)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_rate_is_the_rate_and_every_step_is_as_much_longer(folder: Path) -> None:
    """Adam's steps are proportional to the rate: the first one after the resume is twice as long."""
    short = {"training": {"max_steps": 4}}
    twice = {"training": {"max_steps": 4, "learning_rate": 0.02}}
    run_ranks(
        run,
        1,
        described(folder, "begun"),
        described(folder, "one-step", "begun/checkpoint-3", **short),
        described(folder, "one-step-twice", "begun/checkpoint-3", **twice),
    )
    assert log(folder, "one-step-twice", "learning_rate") == {4: 0.02}
    start, once, double = (moved(folder, *at) for at in (("begun", 3), ("one-step", 4), ("one-step-twice", 4)))
    for name in start:
        expected = start[name] + 2 * (once[name] - start[name])
        torch.testing.assert_close(double[name], expected, rtol=1e-4, atol=1e-6)


def test_recording_for_the_analysis_changes_no_bit_and_goes_on_after_a_resume(runs: None, folder: Path) -> None:
    ours, theirs = log(folder, "unchanged", "loss"), log(folder, "first", "loss")
    assert ours == {step: theirs[step] for step in (4, 5)}
    assert [r.step for r in read_recordings(folder / "first" / "analysis.jsonl")] == [2, 4, 5]
    before, _, *after = read_recordings(folder / "decaying" / "analysis.jsonl")
    assert (before.step, before.method, len(before.matrices)) == (2, "DoRA", 8)
    assert [(r.step, len(r.matrices)) for r in after] == [(4, 2), (6, 2)]
    assert all(m.delta_m and m.delta_d and m.rows for m in before.matrices.values())
    assert not (folder / "unchanged" / "analysis.jsonl").exists()
    figure = folder / "analysis.png"
    assert main(["analyze", str(folder / "first"), str(folder / "decaying"), "--output", str(figure)]) == 0
    panels = json.loads(figure.with_suffix(".json").read_text())["panels"]
    assert [(p["title"], p["steps"], p["points"]) for p in panels] == [
        ("DoRA (first)", [2, 4, 5], 3 * 4),
        ("DoRA (decaying)", [2, 3, 4, 6], 2 * 4 + 2 * 2),
    ]


def test_by_default_each_evaluation_and_checkpoint_is_recorded_for_the_runs_page(runs: None, folder: Path) -> None:
    run_dir = folder / "uninterrupted"
    assert [r.step for r in read_recordings(run_dir / "analysis.jsonl")] == [3, 4, 6]
    page = (run_dir / "report.html").read_text()
    assert "<title>Finished · uninterrupted</title>" in page
    assert "Change of magnitude, ΔM" in page
    assert not (folder / "unchanged" / "report.html").exists()


@pytest.mark.parametrize("name", [name for name in FOLLOWED if name not in ("unchanged", "micro")])
def test_what_is_followed_changes_what_is_trained(runs: None, folder: Path, name: str) -> None:
    last = max(log(folder, name, "loss"))
    unchanged = moved(folder, "unchanged", 5)
    changed = moved(folder, name, last)
    assert any((changed[key] - unchanged[key]).abs().max() > 1e-5 for key in unchanged)


def test_smaller_micro_batches_change_nothing_but_rounding(runs: None, folder: Path) -> None:
    assert log(folder, "micro", "loss") == pytest.approx(log(folder, "unchanged", "loss"), abs=1e-5)


def test_another_interval_of_saving_and_evaluating_is_followed(runs: None, folder: Path) -> None:
    assert set(log(folder, "often", "eval_loss")) == {4, 5}
    assert [path.name for path in sorted((folder / "often").glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-5"]


def test_the_run_folder_says_what_is_used_after_a_resume(runs: None, folder: Path) -> None:
    written = json.loads((folder / "rate" / "config.json").read_text())
    assert written["training"]["learning_rate"] == 0.02
    recorded = json.loads((folder / "rate" / "checkpoint-5" / "manifest.json").read_text())["trained_with"]
    assert recorded["configuration"] == written
    assert json.loads((folder / "decaying" / "config.json").read_text())["training"]["max_steps"] == 6


def test_a_finished_run_is_left_alone_before_its_base_is_read(runs: None, folder: Path) -> None:
    def times(name: str) -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (folder / name).rglob("*") if path.is_file()}

    before = times("decaying")
    weights = folder / "base" / "model.safetensors"
    whole = weights.read_bytes()
    damaged = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}
    save_file(damaged, weights, metadata={"format": "pt"})  # which to load would be an error
    try:
        again = described(folder, "decaying", "auto", training=LINEAR)
        run_ranks(run, 2, again, again)
    finally:
        weights.write_bytes(whole)
    assert {name: time for name, time in times("decaying").items() if ".in_use" not in name} == {
        name: time for name, time in before.items() if ".in_use" not in name
    }


def test_the_best_checkpoint_is_of_one_validation_set(folder: Path) -> None:
    """The metric on other records is another metric: what was best by the old one is no bound for the new."""
    evaluated = {"data": {"validation": str(folder / "validation.json"), "validation_samples": 0}}
    keeping = {"save_every": 1, "keep_best": True, "keep_last": 9}

    def steps(count: int) -> dict[str, Any]:
        training = {"eval_every": 1, "max_steps": count}
        return described(folder, "judged", "auto", training=training, checkpoint=keeping, **evaluated)

    run_ranks(run, 1, steps(2))
    best = folder / "judged" / "best.json"
    state = folder / "judged" / "checkpoint-2" / "trainer_state.json"
    assert json.loads(best.read_text())["eval_loss"] == json.loads(state.read_text())["best_metric"]
    worse = [{**record, "instruction": "§¶" * 40} for record in toy.records(6)]  # what nothing was learnt of
    (folder / "validation.json").write_text(json.dumps(worse))
    run_ranks(run, 1, steps(3))
    assert json.loads(best.read_text())["checkpoint"] == "checkpoint-3"


def relative(folder: Path, raw: dict[str, Any]) -> None:
    os.chdir(folder)
    run(raw)


def test_a_run_of_relative_paths_is_found_from_elsewhere_with_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from dora_dist.checkpoint.adapter_folders import find_adapter
    from dora_dist.evaluation.inference import base_folder

    raw = config(Path("base"), Path("data.json"), Path("away"), training={"max_steps": 1})
    run_ranks(relative, 1, folder, raw)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        adapter, base = find_adapter(folder / "away")
        assert base == str(folder / "base")
        assert base_folder(str(folder / "away")) == folder / "base"
        assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    finally:
        os.chdir(here)
    text = "Answer format: true/false — §"
    assert AutoTokenizer.from_pretrained(adapter)(text).input_ids == toy.tokenizer()(text).input_ids
    files = json.loads((adapter.parent / "manifest.json").read_text())["files"]
    assert {"adapter/tokenizer.json", "adapter/tokenizer_config.json"} <= set(files)
