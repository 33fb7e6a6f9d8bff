"""Tokenized data is made once for all ranks of a node: real processes, one killed while it makes it."""

import time
from pathlib import Path

import pytest
import torch

from dora_dist.config import RunConfig
from dora_dist.data import build_dataset
from dora_dist.data.cache import key_of, tensors_once
from dora_dist.errors import UserError
from tests import toy
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
    assert len({key, *others}) == 5
    assert key_of([str(data), "some/hub-name"], text, {}) is None


def test_a_run_finds_the_same_samples_with_and_without_a_cache(tmp_path: Path) -> None:
    data, text = toy.write_records(tmp_path / "data.json", 20), toy.tokenizer()

    def build(cache: str | None) -> list[dict[str, list[int]]]:
        sections = {"train": str(data), "cutoff_len": 60, "cache": cache}
        config = RunConfig.from_dict({"model": {"path": str(tmp_path)}, "data": sections})
        found = build_dataset(config.data, text, seed=0, progress=False)
        assert "20 cut at 60" in str(found.train_stats)
        return [found.train[i] for i in range(len(found.train))]

    cache = str(tmp_path / "cache")
    assert build(None) == build(cache) == build(cache)
    assert len(list((tmp_path / "cache" / "tokenized").glob("*.safetensors"))) == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    data = toy.write_records(tmp_path / "data.json", 5)
    assert tokenize(blocked, data, tmp_path / "made").tolist() == list(range(10))
    assert "data.cache" in capsys.readouterr().out


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    data = toy.write_records(tmp_path / "data.json", 5)
    tokenize(tmp_path / "cache", data, tmp_path / "made")
    [file] = (tmp_path / "cache").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=rf"{file.name} is damaged .*delete it"):
        tokenize(tmp_path / "cache", data, tmp_path / "made")
