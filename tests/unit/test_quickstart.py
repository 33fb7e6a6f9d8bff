"""The quickstart's data: questions become records, and none is on both sides of the split."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import quickstart
import stages
import torch

from dora_dist.config import RunConfig
from dora_dist.data.records import load_records
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.commonsense import candidates

SOCIAL = "Story {i}; it ends. What will Remy want to do next? A: go: home {i}; B: stay; C: sing a song{dot}"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A wheel laid out like the real one: 300 stories, 300 headlines, and every tenth of them once more."""
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
    path = tmp_path / "texts.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, samples in zip(quickstart.MEMBERS.values(), (stories, headlines), strict=True):
            wheel.writestr(member, "\n".join(json.dumps(sample) for sample in samples + samples[::10]))
    return path


@pytest.fixture
def folder(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quickstart, "HELD_OUT", 100)
    monkeypatch.setattr(quickstart, "TRAIN", {"socialiqa": 200, "sarcasm": 150})
    quickstart.build_data(archive, tmp_path / "data", ["socialiqa", "sarcasm"])
    return tmp_path / "data"


def test_a_story_and_a_headline_become_records(folder: Path) -> None:
    files = [folder / f"{name}.jsonl" for name in ("train", "socialiqa", "sarcasm")]
    records = {record["prompt"]: record for record in load_records(files, "completion")}
    story = records[f"Question: {SOCIAL.format(i=7, dot='.')}\nAnswer:"]
    assert story["choices"] == [" go: home 7", " stay", " sing a song"]
    assert story["completion"] == " stay"
    assert candidates("socialiqa", story) == (story["choices"], 1)
    headlines = [text for text in records if text.startswith("Headline: area man counts to ")]
    assert len(headlines) == 250
    for text in headlines:
        assert records[text]["completion"] == (" no", " yes")[int(text.split()[-2]) % 2]


def test_held_out_questions_are_never_trained_on(folder: Path) -> None:
    train = [record["prompt"] for record in load_records([folder / "train.jsonl"], "completion")]
    assert len(train) == len(set(train)) == 350
    for task in quickstart.MEMBERS:
        held_out = load_records([folder / f"{task}.jsonl"], "completion")
        assert len(held_out) == 100
        assert {record["prompt"] for record in held_out}.isdisjoint(train)


def test_the_data_are_the_same_every_time(folder: Path, archive: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    quickstart.build_data(archive, folder, ["socialiqa", "sarcasm"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_shipped_config_names_the_quickstarts_folders() -> None:
    config = RunConfig.load(stages.ROOT / "configs" / "quickstart.json")
    assert Path(config.model.path) == quickstart.BASE
    assert config.data.train == str(quickstart.FOLDER / "data" / "train.jsonl")
    assert Path(config.checkpoint.run_dir) == quickstart.TRAINED
    assert config.data.format == "completion"
    assert config.adapter.weight_decomposed


def test_the_table_and_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "FOLDER", tmp_path)
    monkeypatch.setattr(quickstart, "TRAINED", tmp_path / "train")
    (tmp_path / "train").mkdir()
    lines = [{"step": 5, "loss": 3.5}, {"step": 10, "loss": 1.25}, {"step": 10, "train_loss": 2.0}]
    (tmp_path / "train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    quickstart.report(
        {"fetch": 1.5, "train": 300.0},
        {"base": {"socialiqa": 0.38, "sarcasm": 0.5}, "merged": {"socialiqa": 0.4825, "sarcasm": 0.865}},
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["training_loss"] == {"first": 3.5, "last": 1.25}
    assert summary["seconds"] == {"fetch": 1.5, "train": 300.0, "total": 301.5}
    assert summary["accuracy"]["merged"] == {"socialiqa": 0.4825, "sarcasm": 0.865}
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown if line.startswith("merged")] == [["merged", "0.482", "0.865"]]


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
