"""Labelled texts: what is read, how pairs are joined and cut, how batches look; and GLUE's metrics."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.config import RunConfig
from dora_dist.data import LabelledCollator, LabelledReader, TokenizedData, WithFiller, labelled_filler, read
from dora_dist.data.sampler import FILLER
from dora_dist.metrics.glue import classification_metrics, rating_metrics
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import problems
from tests import encoders

PAIR = ["sentence1", "sentence2"]


def load(tmp_path: Path, records: list[dict[str, Any]], num_labels: int = 2, **fields: Any) -> TokenizedData:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"train": str(tmp_path / "train.jsonl"), "format": "classification", "text_fields": PAIR, "cutoff_len": 32}
    model = {"path": "org/model", "task": "sequence_classification", "num_labels": num_labels}
    config = RunConfig.from_dict({"model": model, "data": {**data, **fields}})
    reader = LabelledReader(config.data, encoders.tokenizer(), num_labels)
    return read(reader, config.data, seed=0, progress=False)


def test_pairs_are_joined_as_the_tokenizer_does(tmp_path: Path) -> None:
    records = encoders.labelled(6)
    data = load(tmp_path, records)
    tokenizer = encoders.tokenizer()
    assert len(data.train) == 6
    for sample, record in zip(data.train, records, strict=False):
        expected = tokenizer(record["sentence1"], record["sentence2"])
        assert sample["input_ids"] == expected["input_ids"]
        assert sample["token_type_ids"] == expected["token_type_ids"]
        assert sample["label"] == record["label"]
    assert set(data.train[0]["token_type_ids"]) == {0, 1}
    assert data.train_stats.truncated == 0
    assert str(data.train_stats) == f"6 samples, {sum(len(sample['input_ids']) for sample in data.train)} tokens"


def test_a_single_text(tmp_path: Path) -> None:
    data = load(tmp_path, encoders.labelled(2), text_fields=["sentence1"])
    assert data.train[0]["input_ids"] == encoders.tokenizer()("film 0 was awful")["input_ids"]


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    data = load(tmp_path, encoders.labelled(6), cutoff_len=10)
    assert max(len(sample["input_ids"]) for sample in data.train) == 10
    assert data.train_stats.truncated == sum(
        len(encoders.tokenizer()(r["sentence1"], r["sentence2"])["input_ids"]) > 10 for r in encoders.labelled(6)
    )
    assert 0 < data.train_stats.truncated < 6
    with pytest.raises(UserError, match="takes 64 tokens at most"):
        load(tmp_path, encoders.labelled(6), cutoff_len=65)


def test_records_are_held_out(tmp_path: Path) -> None:
    data = load(tmp_path, encoders.labelled(10), validation_samples=3)
    assert (len(data.train), len(data.validation)) == (7, 3)
    every = sorted([*data.train.index, *data.validation.index])
    assert every == list(range(10))


@pytest.mark.parametrize(
    ("label", "num_labels", "message"),
    [
        (2, 2, r'line 3: "label" is 2; with model.num_labels = 2 it must be a whole number from 0 to 1'),
        (-1, 2, "a test split hides its labels"),
        ("1", 2, "\"label\" is '1'"),
        (True, 2, '"label" is True'),
        (0.5, 2, '"label" is 0.5'),
        (None, 2, 'line 3: "label" is null'),
        ("good", 1, "must be a number"),
        (math.inf, 1, "must be a number"),
    ],
)
def test_labels_that_are_none_are_refused(label: Any, num_labels: int, message: str, tmp_path: Path) -> None:
    records = encoders.labelled(4)
    records[2]["label"] = label
    with pytest.raises(UserError, match=message):
        load(tmp_path, records, num_labels)


def test_missing_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'has no "premise"; this format needs "premise", "label"'):
        load(tmp_path, encoders.labelled(4), text_fields=["premise"])


@pytest.mark.parametrize("rating", [False, True])
def test_batches_are_padded_and_fillers_have_no_label(rating: bool, tmp_path: Path) -> None:
    records = encoders.labelled(4, rating)
    data = WithFiller(load(tmp_path, records, 1 if rating else 2).train, labelled_filler(0))
    batch = LabelledCollator(encoders.tokenizer(), rating, 8)([data[0], data[2], data[FILLER]])
    lengths = [len(data[0]["input_ids"]), len(data[2]["input_ids"]), 1]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (3, 16)
    assert batch["input_ids"][0, : lengths[0]].tolist() == data[0]["input_ids"]
    assert batch["token_type_ids"][1, : lengths[1]].tolist() == data[2]["token_type_ids"]
    assert batch["labels"].tolist() == [records[0]["label"], records[2]["label"], -100]
    assert batch["labels"].dtype == (torch.float32 if rating else torch.int64)


def test_classification_metrics_by_hand() -> None:
    predicted, labels = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 0, 0, 1])
    logits = torch.nn.functional.one_hot(predicted, 2).float()
    metrics = classification_metrics(logits, labels)  # 2 true and 1 false positives, 2 true and 1 false negatives
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics["matthews"] == pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))
    assert "f1" not in classification_metrics(torch.eye(3), torch.arange(3))
    assert classification_metrics(torch.eye(3), torch.arange(3))["matthews"] == 1.0


def test_rating_metrics_by_hand() -> None:
    predicted, labels = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    found, expected = predicted - predicted.mean(), labels - labels.mean()
    metrics = rating_metrics(predicted, labels)
    assert metrics["pearson"] == pytest.approx(float(found @ expected / (found.norm() * expected.norm())))
    assert metrics["spearman"] == pytest.approx(1.0)
    assert rating_metrics(torch.ones(4), labels) == {"pearson": 0.0, "spearman": 0.0}


CLASSIFIER = {"path": "org/model", "task": "sequence_classification"}


@pytest.mark.parametrize(
    ("model", "data", "training", "message"),
    [
        (CLASSIFIER, {}, {}, "sequence_classification and the format classification go together"),
        ({"path": "m"}, {"format": "classification"}, {}, 'model.task = "causal_lm"'),
        ({"path": "m"}, {}, {"metric": "f1"}, 'training.metric = "f1": there is none for model.task = "causal_lm"'),
        (
            {**CLASSIFIER, "num_labels": 3},
            {"format": "classification"},
            {"metric": "f1"},
            "model.num_labels = 3; use loss, accuracy, matthews",
        ),
        (
            {**CLASSIFIER, "num_labels": 1},
            {"format": "classification"},
            {"metric": "accuracy"},
            "model.num_labels = 1; use loss, pearson, spearman",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(model: dict, data: dict, training: dict, message: str) -> None:
    raw = {"model": model, "data": {"train": "org/data", **data}, "training": training}
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(raw, rules=problems)
    assert message in str(caught.value)
