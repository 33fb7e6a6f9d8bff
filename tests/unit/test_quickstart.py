"""The quickstart's data: questions become records, and none is on both sides of the split."""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import quickstart
import stages
import torch
from safetensors.torch import save_file

from dora_dist.checkpoint.manifest import write_manifest
from dora_dist.config import RunConfig
from dora_dist.data.records import load_records
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.commonsense import candidates

SOCIAL = "Story {i}; it ends. What will Remy want to do next? A: go: home {i}; B: stay; C: sing a song{dot}"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A wheel laid out like the real one: 300 samples of each task, and every tenth of them once more."""
    stories = [
        {
            "input": [{"role": "user", "content": SOCIAL.format(i=i, dot="." * (i % 2))}],
            "ideal": "ABC"[i % 3],
        }
        for i in range(300)
    ]
    system = {"role": "system", "content": "Respond with only a 1 or 0"}
    headlines = [
        {"input": [system, {"role": "user", "content": f"area man counts to {i}"}], "ideal": str(i % 2)}
        for i in range(300)
    ]
    situations = [
        {
            "input": [system, {"role": "user", "content": f"More than {i} resistors. It\n\n A: rises {i}\n B: falls"}],
            "ideal": "AB"[i % 2],
        }
        for i in range(300)
    ]
    path = tmp_path / "texts.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, samples in zip(quickstart.MEMBERS.values(), (stories, headlines, situations), strict=True):
            wheel.writestr(member, "\n".join(json.dumps(sample) for sample in samples + samples[::10]))
    return path


@pytest.fixture
def folder(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quickstart, "HELD_OUT", 100)
    monkeypatch.setattr(quickstart, "TRAIN", {"socialiqa": 200, "sarcasm": 150, "quartz": 130})
    quickstart.build_data(archive, tmp_path / "data", list(quickstart.MEMBERS))
    return tmp_path / "data"


def test_samples_of_every_task_become_records(folder: Path) -> None:
    files = [folder / f"{name}.jsonl" for name in ("train", *quickstart.MEMBERS)]
    records = {record["prompt"]: record for record in load_records(files, "completion")}
    story = records[f"Question: {SOCIAL.format(i=7, dot='.')}\nAnswer:"]
    assert story["choices"] == [" go: home 7", " stay", " sing a song"]
    assert story["completion"] == " stay"
    assert candidates("socialiqa", story) == (story["choices"], 1)
    headlines = [text for text in records if text.startswith("Headline: area man counts to ")]
    assert len(headlines) == 250
    for text in headlines:
        assert records[text]["completion"] == (" no", " yes")[int(text.split()[-2]) % 2]
    situation = records["More than 8 resistors. It"]
    assert (situation["choices"], situation["completion"]) == ([" rises 8", " falls"], " rises 8")


def test_held_out_questions_are_never_trained_on(folder: Path) -> None:
    train = [record["prompt"] for record in load_records([folder / "train.jsonl"], "completion")]
    assert len(train) == len(set(train)) == 480
    for task in quickstart.MEMBERS:
        held_out = load_records([folder / f"{task}.jsonl"], "completion")
        assert len(held_out) == 100
        assert {record["prompt"] for record in held_out}.isdisjoint(train)


def test_the_data_are_the_same_every_time(folder: Path, archive: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    quickstart.build_data(archive, folder, list(quickstart.MEMBERS))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_shipped_config_names_the_quickstarts_folders() -> None:
    config = RunConfig.load(stages.ROOT / "configs" / "quickstart.json")
    assert Path(config.model.path) == quickstart.BASE
    assert config.data.train == str(quickstart.FOLDER / "data" / "train.jsonl")
    assert Path(config.checkpoint.run_dir) == quickstart.TRAINED
    assert config.data.format == "completion"
    assert config.adapter.weight_decomposed


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder with finished runs of LoRA and of DoRA: their losses, and checkpoints of 20 and 30 trained numbers."""
    monkeypatch.setattr(quickstart, "FOLDER", tmp_path)
    for name, size in (("lora", 2), ("dora", 3)):
        run_dir = tmp_path / name
        monkeypatch.setitem(quickstart.METHODS, name, replace(quickstart.METHODS[name], run_dir=run_dir))
        checkpoint = run_dir / "checkpoint-10"
        checkpoint.mkdir(parents=True)
        lines = [{"step": 5, "loss": 3.5}, {"step": 10, "loss": 0.75 + size / 4}, {"step": 10, "train_loss": 2.0}]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        state = {f"a.{key}": torch.ones(10, size) for key in ("master", "exp_avg", "exp_avg_sq")}
        save_file(state, checkpoint / "state.safetensors")
        write_manifest(checkpoint, {"step": 10, "model": {"trainable": {"a": [10, size]}}})


def test_the_table_and_the_summary(finished: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.report(
        {"fetch": 1.5, "train": 300.0},
        {"base": {"socialiqa": 0.38, "sarcasm": 0.5}, "merged": {"socialiqa": 0.4825, "sarcasm": 0.865}},
        ["dora"],
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["training_loss"] == {"dora": {"first": 3.5, "last": 1.5}}
    assert summary["trained_numbers"] == {"dora": 30}
    assert summary["seconds"] == {"fetch": 1.5, "train": 300.0, "total": 301.5}
    assert summary["accuracy"]["merged"] == {"socialiqa": 0.4825, "sarcasm": 0.865}
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown if line.startswith("merged")] == [["merged", "0.482", "0.865"]]
    assert "training loss 3.500 -> 1.500; 302 s in all" in shown


def test_several_methods_are_shown_with_what_each_trained(
    finished: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["lora", "dora"]
    assert quickstart.models(methods) == {
        "base": quickstart.BASE,
        "LoRA adapter": tmp_path / "lora",
        "DoRA adapter": tmp_path / "dora",
    }
    assert "merged" in quickstart.models(["dora"])
    results = {name: {"sarcasm": 0.5 + i / 10} for i, name in enumerate(quickstart.models(methods))}
    quickstart.report({"train lora": 1.0}, results, methods)
    shown = capsys.readouterr().out.splitlines()
    assert "DoRA adapter        0.700" in shown
    assert "LoRA: 20 trained numbers at the end, training loss 3.500 -> 1.250" in shown


def test_methods_are_what_their_options_make_of_the_configurations(tmp_path: Path) -> None:
    for name, (dynamic, decomposed) in {
        "lora": (False, False),
        "dora": (False, True),
        "dynamic": (True, False),
        "union": (True, True),
    }.items():
        method = quickstart.METHODS[name]
        config = RunConfig.load(stages.ROOT / method.recipe, method.options)
        assert (config.adapter.dynamic_rank, config.adapter.weight_decomposed) == (dynamic, decomposed)
        assert Path(config.checkpoint.run_dir) == method.run_dir
        assert config.data.train == str(quickstart.FOLDER / "data" / "train.jsonl")
    assert len({method.run_dir for method in quickstart.METHODS.values()}) == 4


def test_a_failing_command_ends_the_quickstart() -> None:
    with pytest.raises(UserError, match="false failed with exit status 1"):
        stages.run("false")


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_demo_starts_a_rank_for_each_gpu_at_most_two(
    gpus: int, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(stages, "run", lambda *words: typed.extend(words))
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what the demo sets ends with this test
    monkeypatch.chdir(tmp_path)
    stages.set_environment()
    stages.train("configs/quickstart.json", tmp_path / "train")
    assert os.environ["DS_ACCELERATOR"] == ("cuda" if gpus else "cpu")
    assert typed[typed.index("--num_accelerators") + 1] == str(ranks)
    assert ("--bind_cores_to_rank" in typed) <= (gpus == 0)
