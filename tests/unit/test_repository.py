"""A data set's folder: which of its files are which configuration and split. From the hub: tests/launch/test_hub.py."""

from pathlib import Path

import pytest

from dora_dist.config.names import DataSet, data_set
from dora_dist.data import load_records
from dora_dist.data.repository import data_files
from dora_dist.runtime.errors import UserError
from tests import toy


def names(folder: Path, rest: str = "", split: str = "train") -> list[str]:
    data = data_set(f"{folder}{rest}")
    assert data is not None
    return [file.relative_to(folder).as_posix() for file in data_files(data, split, field="data.train")]


def write(folder: Path, *files: str, card: str = "") -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        toy.write_records(folder / name, 2)
    if card:
        (folder / "README.md").write_text(f"---\nconfigs:\n{card}\n---\n")
    return folder


def test_sources_that_are_files_and_sources_that_are_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, "here/train.json", "odd:name.json"))
    assert data_set("lab/set") == DataSet("lab/set")
    assert data_set("lab/set:a") == DataSet("lab/set", "a")
    assert data_set("lab/set:a:test") == DataSet("lab/set", "a", "test")
    assert data_set("lab/set:b/c.jsonl") == DataSet("lab/set", file="b/c.jsonl")
    assert data_set("here") == DataSet("here") and data_set("./here:a") == DataSet("./here", "a")
    for file in ("here/train.json", "odd:name.json", "no/train.json", "./no", "../no", "/no", "~/no", "no.parquet"):
        assert data_set(file) is None, file


def test_by_the_names_of_files_where_no_card_says(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "anything.json")
    assert names(one) == ["anything.json"]
    several = write(tmp_path / "several", "data/train-0.json", "data/train-1.json", "data/validation-0.json")
    assert names(several) == ["data/train-0.json", "data/train-1.json"]
    assert names(several, split="validation") == ["data/validation-0.json"]
    converted = write(tmp_path / "converted", "default/train/0.json", "default/test/0.json")
    assert names(converted) == names(converted, ":default") == ["default/train/0.json"]
    assert names(converted, ":default:test") == ["default/test/0.json"]
    assert len(load_records([str(several)], "instruction")) == 4
    with pytest.raises(UserError, match="has no split 'test'; it has train, validation .say which: .*:train"):
        names(several, split="test")
    with pytest.raises(UserError, match="has no configuration 'x'; it has default"):
        names(converted, ":x")


def test_by_the_card(tmp_path: Path) -> None:
    card = """- config_name: a
  data_files: [one.json, ./two.json]
- config_name: b
  default: true
  data_files:
  - split: train
    path: [b/*.json]
"""
    folder = write(tmp_path, "one.json", "two.json", "b/3.json", card=card)
    assert names(folder, ":a") == ["one.json", "two.json"]
    assert names(folder) == names(folder, ":b:train") == ["b/3.json"]


@pytest.mark.parametrize("path", ["../secret.json", "/secret.json", "a/../../secret.json"])
def test_nothing_outside_of_the_folder_is_read(tmp_path: Path, path: str) -> None:
    toy.write_records(tmp_path / "secret.json", 1)
    folder = write(tmp_path / "set", "a/1.json", card=f"- config_name: default\n  data_files: {path}")
    with pytest.raises(UserError, match="outside of its folder"):
        names(folder)
    with pytest.raises(UserError, match="outside of its folder"):
        names(folder, f":{path}")


def test_a_card_that_cannot_be_read_and_kinds_of_files_that_are_not(tmp_path: Path) -> None:
    broken = write(tmp_path / "broken", "a.json", card="- data_files: a.json")
    with pytest.raises(UserError, match="README.md"):
        names(broken)
    table = tmp_path / "table"
    table.mkdir()
    (table / "train.xml").write_text("<a>1</a>")
    with pytest.raises(UserError, match="has no .json, .jsonl, .parquet, .* file for its split 'train'"):
        names(table)
