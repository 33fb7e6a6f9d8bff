"""Tokenized data is made once for all ranks of a node: real processes, one killed while it makes it."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.config import DataConfig, RunConfig
from dora_dist.data import ConversationReader, TextReader, TokenizedData, read
from dora_dist.data.cache import key_of, tensors_once
from dora_dist.data.strings import pack, unpack
from dora_dist.models.families import load_processor
from dora_dist.runtime.errors import UserError
from dora_dist.training.agreement import of_data
from tests import llava, toy
from tests.ranks import context


def tokenize(cache: Path | None, data: Path, made: Path, slowly: float = 0.0) -> torch.Tensor:
    def make() -> dict[str, torch.Tensor]:
        with made.open("a") as file:
            file.write("made\n")
        time.sleep(slowly)
        return {"tokens": torch.arange(10, dtype=torch.int32), "cut": torch.tensor([True, False])}

    assert cache is not None
    key = key_of([str(data)], toy.tokenizer(), {"cutoff_len": 8})
    assert key is not None
    found = tensors_once(cache, key, make)
    assert found["cut"].tolist() == [True, False]
    return found["tokens"]


def test_one_process_makes_it_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    data, made = toy.write_records(tmp_path / "data.json", 5), tmp_path / "made"
    killed = context().Process(target=tokenize, args=(tmp_path / "cache", data, made, 60.0))
    killed.start()
    while not made.exists():
        time.sleep(0.01)
    killed.kill()
    killed.join()
    several = [context().Process(target=tokenize, args=(tmp_path / "cache", data, made, 0.2)) for _ in range(3)]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0, 0, 0]
    assert made.read_text().splitlines() == ["made"] * 2  # the killed one, and one of three
    assert tokenize(tmp_path / "cache", data, made).tolist() == list(range(10))


def test_the_key_follows_content_tokenizer_and_settings(tmp_path: Path) -> None:
    data, text = toy.write_records(tmp_path / "a.json", 5), toy.tokenizer()
    key = key_of([str(data)], text, {"cutoff_len": 8})
    copy = tmp_path / "b.json"
    copy.write_bytes(data.read_bytes())
    assert key_of([str(copy)], text, {"cutoff_len": 8}) == key
    others = [key_of([str(data)], text, {"cutoff_len": 9}), key_of([str(data), str(copy)], text, {"cutoff_len": 8})]
    toy.write_records(data, 6)
    others.append(key_of([str(data)], text, {"cutoff_len": 8}))
    text.add_tokens(["new"])
    others.append(key_of([str(data)], text, {"cutoff_len": 8}))
    text.bos_token = "new"  # chat templates may begin with it
    others.append(key_of([str(data)], text, {"cutoff_len": 8}))
    text.truncation_side = "left"
    others.append(key_of([str(data)], text, {"cutoff_len": 8}))
    assert len({key, *others}) == 7
    text(["a b c"], truncation=True, max_length=2)  # which a fast tokenizer keeps for the next call
    assert key_of([str(data)], text, {"cutoff_len": 8}) == others[-1]
    assert key_of([str(data), "some/hub-name"], text, {}) is None


def test_a_run_finds_the_same_samples_with_and_without_a_cache(tmp_path: Path) -> None:
    data, text = toy.write_records(tmp_path / "data.json", 20), toy.tokenizer()

    def build(cache: str | None) -> list[dict[str, list[int]]]:
        sections = {"train": str(data), "cutoff_len": 60, "cache": cache}
        config = RunConfig.from_dict({"model": {"path": str(tmp_path)}, "data": sections})
        found = read(TextReader(config.data, text), config.data, seed=0, progress=False)
        assert "20 cut at 60" in str(found.train_stats)
        return [found.train[i] for i in range(len(found.train))]

    cache = str(tmp_path / "cache")
    assert build(None) == build(cache) == build(cache)
    assert len(list((tmp_path / "cache" / "tokenized").glob("*.safetensors"))) == 1


def test_what_is_odd_is_said_of_cached_data_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, text = [*toy.records(3), {"instruction": "a </s> b", "output": ""}], toy.tokenizer()
    files = [tmp_path / "data.json", tmp_path / "copy.json"]
    for file in files:
        file.write_text(json.dumps(rows))
    said = []
    for file in (files[0], files[0], files[1]):  # made, from the cache, and by another name
        data = DataConfig(train=str(file), cutoff_len=400, cache=str(tmp_path / "cache"))
        read(TextReader(data, text), data, seed=0, progress=False)
        said.append(capsys.readouterr().err)
    first = said[0]
    assert f'data.train: "output" of 1 of 4 records is empty (first: {files[0]}, record 4)' in first
    assert f"of 1 of 4 records holds special tokens (</s>; first: {files[0]}, record 4)" in first
    assert said == [first, first, first.replace("data.json", "copy.json")]


@pytest.fixture
def pictured(tmp_path: Path) -> Path:
    """A folder with a LLaVA `base`, and conversations `data.json` with `pictures`."""
    llava.model(tmp_path / "base")
    llava.write(tmp_path, 8, 6)
    return tmp_path


def conversations(folder: Path, tokens_per_picture: int = 4, **fields: Any) -> TokenizedData:
    sections = {"train": str(folder / "data.json"), "format": "llava", "loss_on": "answer", "cutoff_len": 400}
    data = DataConfig(**{**sections, "image_folder": str(folder / "pictures"), **fields})
    processor = load_processor(folder / "base", data)
    processor = replace(processor, stands=replace(processor.stands, count=tokens_per_picture))
    return read(ConversationReader(data, processor), data, seed=0, progress=False)


def place(data: TokenizedData, i: int) -> str:
    """Where sample i was read."""
    assert isinstance(data.train.reader, ConversationReader)
    return data.train.reader.place_of(data.train.table, int(data.train.index[i]))


def made(cache: Path) -> dict[str, int]:
    """Files of the cache, and when they were written."""
    return {file.name: file.stat().st_mtime_ns for file in (cache / "tokenized").glob("*.safetensors")}


def test_conversations_are_the_same_with_and_without_a_cache(pictured: Path) -> None:
    cache = pictured / "cache"
    plain, first = conversations(pictured, cache=None), conversations(pictured, cache=str(cache))
    files = made(cache)
    again = conversations(pictured, cache=str(cache))
    assert made(cache) == files and len(files) == 1
    for found in (first, again):
        assert (found.train_stats, of_data(found)) == (plain.train_stats, of_data(plain))
        for i, (ours, theirs) in enumerate(zip(found.train, plain.train, strict=True)):
            assert (ours["input_ids"], ours["labels"]) == (theirs["input_ids"], theirs["labels"])
            assert [*map(torch.Tensor.tolist, ours["pictures"])] == [*map(torch.Tensor.tolist, theirs["pictures"])]
            assert place(found, i) == place(plain, i)


def test_pictures_are_looked_for_anew_whatever_is_cached(pictured: Path) -> None:
    cache = str(pictured / "cache")
    conversations(pictured, cache=cache)
    less = Path(shutil.copytree(pictured / "pictures", pictured / "less"))
    (less / json.loads((pictured / "data.json").read_text())[3]["image"]).unlink()
    with pytest.raises(UserError, match=r"data.json, record 4 \(id 'p3'\): picture .*less.* does not exist"):
        conversations(pictured, cache=cache, image_folder=str(less))
    found = conversations(pictured, cache=cache, image_folder=str(less), bad_images="skip")
    assert (found.train_stats.samples, found.train_stats.without_picture) == (14, 1)
    assert len(made(pictured / "cache")) == 1


def test_conversations_are_made_anew_for_whatever_they_follow_from(pictured: Path) -> None:
    copy = Path(shutil.copy(pictured / "data.json", pictured / "copy.json"))
    changes: list[dict[str, Any]] = [
        {},
        {"tokens_per_picture": 5},
        {"cutoff_len": 200},
        {"chat_template": "model"},
        {"train": str(copy)},
        {"train": [str(copy), str(pictured / "data.json")]},
    ]
    cache = pictured / "cache"
    for number, change in enumerate(changes, start=1):
        plain, found = (conversations(pictured, **change, cache=where) for where in (None, str(cache)))
        assert len(made(cache)) == number
        assert of_data(found) == of_data(plain)
        assert [place(found, i) for i in (0, -1)] == [place(plain, i) for i in (0, -1)]  # they name the file


def test_conversations_without_any_picture_are_cached_too(pictured: Path) -> None:
    texts = [row for row in json.loads((pictured / "data.json").read_text()) if "image" not in row]
    (pictured / "data.json").write_text(json.dumps(texts))
    plain, first, again = (conversations(pictured, cache=c) for c in (None, *[str(pictured / "cache")] * 2))
    assert of_data(plain) == of_data(first) == of_data(again)
    assert [sample["pictures"] for sample in again.train] == [[]] * 6 and made(pictured / "cache")


def test_strings_come_back_whole() -> None:
    for strings in ([], [""], ["a", "", "größer/图.png", "half \ud83d"], ["\0", "\n"]):
        text, starts = pack(strings)
        assert unpack(text, starts, 0, len(strings)) == strings
        assert [unpack(text, starts, i, i + 1) for i in range(len(strings))] == [[string] for string in strings]
        assert unpack(text, starts, len(strings), len(strings)) == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    data = toy.write_records(tmp_path / "data.json", 5)
    assert tokenize(blocked, data, tmp_path / "made").tolist() == list(range(10))
    assert "data.cache" in capsys.readouterr().err


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    data = toy.write_records(tmp_path / "data.json", 5)
    tokenize(tmp_path / "cache", data, tmp_path / "made")
    [file] = (tmp_path / "cache").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=rf"{file.name} is damaged .*delete it"):
        tokenize(tmp_path / "cache", data, tmp_path / "made")
