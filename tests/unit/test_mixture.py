"""Sources mixed by weights: in proportion, once each before one comes again, the same at any number of ranks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.config import DataConfig, RunConfig
from dora_dist.config.mixture import MixtureSource, names_of
from dora_dist.data import EpochBatches, RaggedDataset, TextReader, read
from dora_dist.data.mixture import Mixture
from dora_dist.data.sampler import FILLER
from dora_dist.runtime.errors import UserError
from dora_dist.training.fetching import fetched_for_data
from tests import toy

SOURCES = torch.tensor([0] * 30 + [1] * 7 + [2] * 3)
MIXTURE = Mixture(("a", "b", "c"), (1.0, 2.5, 0.5))


def epochs(count: int, seed: int = 3, **ranks: int) -> list[list[int]]:
    """The samples of each epoch in the order in which global batches of 6 take them."""
    world, found = ranks.get("world", 1), []
    of_rank = [
        EpochBatches(
            len(SOURCES),
            global_batch_size=6,
            micro_batch_size=ranks.get("micro", 6),
            world_size=world,
            rank=rank,
            seed=seed,
            order=MIXTURE.order(SOURCES, lambda drawn: None),
        )
        for rank in range(world)
    ]
    for epoch in range(count):
        for batches in of_rank:
            batches.set_epoch(epoch)
        steps = zip(*of_rank, strict=True)
        found.append([i for step in steps for batch in step for i in batch if i != FILLER])
    return found


def test_each_epoch_has_its_share_of_each_source() -> None:
    for order in epochs(5):
        assert Counter(SOURCES[order].tolist()) == {0: 10, 1: 25, 2: 5}
    assert Mixture(("a", "b", "c"), (1, 1, 1)).drawn(10) == [4, 3, 3]
    assert Mixture(("a", "b"), (1, 1e9)).drawn(10) == [0, 10]


def test_no_sample_comes_again_before_all_of_its_source_have_come() -> None:
    taken: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for order in epochs(6):
        counts = {k: Counter(taken[k]) for k in taken}
        for k in taken:
            new = [i for i in order if SOURCES[i] == k]
            taken[k] += new
            after = Counter(taken[k])
            members = (k == SOURCES).nonzero()[:, 0].tolist()
            assert max(after[i] for i in members) - min(after[i] for i in members) <= 1
            assert all(after[i] >= counts[k][i] for i in members)
    assert sorted(taken[0][:30]) == list(range(30))


def test_the_order_is_of_seed_and_epoch_alone() -> None:
    first = epochs(3)
    assert epochs(3) == first and epochs(3, seed=4) != first
    assert len({tuple(order) for order in first}) == 3
    assert epochs(3, world=2, micro=3) == epochs(3, world=3, micro=2) == epochs(3, world=3, micro=1) == first


def test_samples_that_are_grouped_stay_in_their_groups() -> None:
    def grouped(drawn: torch.Tensor) -> Any:
        return lambda seed, batch: [*reversed(range(len(drawn))), FILLER]

    order = MIXTURE.order(SOURCES, grouped)(3 * 1_000_003, 6)
    assert order == [*reversed(MIXTURE.order(SOURCES, lambda drawn: None)(3 * 1_000_003, 6)), FILLER]


def build(train: Any, **fields: Any) -> Any:
    data = DataConfig(train=train, **{"cutoff_len": 512, "cache": None, **fields})
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    return read(TextReader(data, tokenizer), data, seed=1, progress=False)


def test_sources_keep_their_names_formats_and_held_out_records(tmp_path: Path) -> None:
    a = str(toy.write_records(tmp_path / "a.json", 8))
    rows = [{"prompt": f"{i}?", "completion": "yes"} for i in range(4)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train: list[dict[str, Any]] = [
        {"path": a, "weight": 3, "name": "questions"},
        {"path": str(tmp_path / "b.jsonl"), "format": "completion"},
        {"path": [a]},
    ]
    data = build(train, validation_samples=3, loss_on="answer")
    mixed: RaggedDataset = data.train
    assert len(mixed) == 17 and len(data.validation) == 3
    assert [(share.name, share.drawn) for share in mixed.shares] == [("questions", 10), ("b", 4), ("a", 3)]
    counts = Counter(mixed[i]["source"] for i in range(len(mixed)))
    assert [counts[k] for k in range(3)] == [share.samples for share in mixed.shares]
    text = toy.tokenizer()
    short = next(mixed[i] for i in range(len(mixed)) if mixed[i]["source"] == 1)
    assert text.decode(short["input_ids"]).endswith("?yes</s>")
    assert "source" not in data.validation[0]
    other = build([{**train[0], "weight": 2}, *train[1:]], validation_samples=3, loss_on="answer").train
    assert other.fingerprint() == mixed.fingerprint() and other.order_facts != mixed.order_facts


def test_a_source_that_no_epoch_would_have_is_refused(tmp_path: Path) -> None:
    a = str(toy.write_records(tmp_path / "a.json", 8))
    with pytest.raises(UserError, match=r'source 2 \("rare"\) is never drawn: its weight is less than one of the 16'):
        build([{"path": a, "weight": 100}, {"path": a, "name": "rare"}])


def test_each_source_has_a_name_of_its_own() -> None:
    def names(*given: tuple[str, str | None]) -> list[str]:
        return names_of([MixtureSource(path=path, name=name) for path, name in given])

    assert names(("a.json", None), ("a.csv", None)) == ["a", "a-2"]
    assert names(("a.json", None), ("b.json", "a-3"), ("a.csv", None)) == ["a", "a-3", "a-4"]
    assert names(("a.json", None), ("b.json", "a")) == ["a-1", "a"]


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        ([{"path": "a", "wieght": 1}], 'data.train, source 1: unknown key "wieght"; a source has path, weight'),
        ([{"path": "a"}, "b"], "data.train, source 2 = 'b': some sources have weights, so each must be an object"),
        ([{"weight": 1}], 'data.train, source 1, "path": missing'),
        ([{"path": "a", "weight": 0}], 'data.train, source 1, "weight": 0: input should be greater than 0'),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(train: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DataConfig(train=train)


def test_no_two_sources_have_one_name() -> None:
    named = [MixtureSource(path="x", name=name) for name in ("a-3", "a", "a", "a-3", "a")]
    assert names_of(named) == ["a-3", "a", "a-4", "a-3-4", "a-5"]


def test_a_data_set_is_called_as_it_was_named_whatever_its_files_are(tmp_path: Path) -> None:
    for name in ("sums", "chats"):
        (tmp_path / name).mkdir()
        toy.write_records(tmp_path / name / "train-00000-of-00001.json", 4)
    sources = [{"path": str(tmp_path / "sums")}, {"path": str(tmp_path / "chats"), "weight": 2}]
    config = RunConfig.from_dict({"model": {"path": str(tmp_path)}, "data": {"train": sources, "cache": None}})
    local = fetched_for_data(config)
    assert names_of(local.data.train) == ["sums", "chats"]
    assert [Path(each.path[0]).name for each in local.data.train] == ["train-00000-of-00001.json"] * 2


def test_a_source_that_teaches_nothing_is_named(tmp_path: Path) -> None:
    good = {"path": str(toy.write_records(tmp_path / "a.json", 4))}
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "x " * 300, "output": "y"}]))
    with pytest.raises(UserError, match=r'data.train, source 2 \("b"\) has no sample to learn from'):
        build([good, {"path": str(tmp_path / "b.json")}], loss_on="answer", cutoff_len=300)
