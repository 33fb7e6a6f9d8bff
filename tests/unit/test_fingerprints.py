"""Every kind of data set is told apart by one word, label, reference or picture's name, wherever it is in a record."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.config import RunConfig
from dora_dist.data import read
from dora_dist.data.columns import fingerprint
from dora_dist.data.pictures import PictureProcessor, PictureReader, PictureTokens
from dora_dist.models.families import load_processor
from dora_dist.tasks import task_named
from dora_dist.training.agreement import of_data
from tests import encoders, llava, summaries, toy

Edit = Callable[[list[dict[str, Any]]], None]


def say(field: str, old: str, new: str) -> Edit:
    """In the record 1, which every set below keeps for training."""

    def edit(records: list[dict[str, Any]]) -> None:
        assert old in records[1][field]
        records[1][field] = records[1][field].replace(old, new)

    return edit


def put(value: Any, *place: Any) -> Edit:
    def edit(records: list[dict[str, Any]]) -> None:
        inside = records[1]
        for key in place[:-1]:
            inside = inside[key]
        assert inside[place[-1]] != value
        inside[place[-1]] = value

    return edit


EDITS: dict[str, dict[str, Edit]] = {
    "language": {"prompt": say("instruction", "true or", "true of"), "answer": say("output", "false", "true")},
    "conversations": {
        "question": put("<image>\nis it blue?", "conversations", 0, "value"),
        "answer": put("the answer is grey", "conversations", 1, "value"),
        "picture": put("a/0-red.jpg", "image"),
    },
    "labelled": {"text": say("sentence1", "film 1", "film 2"), "label": lambda records: records[1].update(label=1)},
    "spans": {
        "question": say("question", "1", "3"),
        "answer": lambda records: records[1]["answers"].update(
            text=["1"], answer_start=[records[1]["context"].index("1")]
        ),
        "one more answer": lambda records: records[1]["answers"].update(
            {key: 2 * value for key, value in records[1]["answers"].items()}
        ),
    },
    "summaries": {
        "document": say("document", "1", "2"),
        "summary": say("summary", "1", "2"),
        "reference, behind the last token": lambda records: records[1].update(summary=records[1]["summary"] + " end"),
    },
}


def build(
    kind: str, folder: Path, records: list[dict[str, Any]], tokenizer: Any = None, **fields: Any
) -> dict[str, str]:
    (folder / "train.json").write_text(json.dumps(records))
    model: dict[str, Any] = {"path": "org/model"}
    data: dict[str, Any] = {"train": str(folder / "train.json"), "cutoff_len": 512, "cache": None}
    if kind == "language":
        tokenizer = tokenizer or toy.tokenizer()
    elif kind == "conversations":
        model |= {"task": "image_text_to_text"}
        data |= {"format": "llava", "image_folder": str(folder / "pictures"), "loss_on": "answer", "cutoff_len": 400}
    elif kind == "labelled":
        model |= {"task": "sequence_classification", "num_labels": 2}
        data |= {"format": "classification", "text_fields": ["sentence1", "sentence2"], "cutoff_len": 32}
        tokenizer = tokenizer or encoders.tokenizer()
    elif kind == "spans":
        model |= {"task": "question_answering"}
        data |= {"format": "squad", "cutoff_len": 40, "doc_stride": 6}
        tokenizer = tokenizer or encoders.tokenizer()
    else:
        model |= {"task": "seq2seq_lm"}
        data |= {"format": "summarisation", "text_fields": ["document"], "label_field": "summary"}
        data |= {"cutoff_len": 40, "target_len": 5}
        texts = [text for record in summaries.records(30) for text in record.values()]
        tokenizer = tokenizer or summaries.tokenizer(texts)
    config = RunConfig.from_dict({"model": model, "data": {**data, **fields}})
    if tokenizer is None:
        tokenizer = load_processor(folder / "base", config.data)
    reader = task_named(config.model.task).reader(tokenizer, model=config.model, data=config.data)
    return of_data(read(reader, config.data, seed=0, progress=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fingerprints")
    llava.model(folder / "base")
    return folder


def records_of(kind: str, folder: Path) -> list[dict[str, Any]]:
    if kind == "conversations":
        return llava.conversations(llava.pictures(folder / "pictures"))
    makers: dict[str, Callable[[int], list[dict[str, Any]]]] = {
        "language": toy.records,
        "labelled": encoders.labelled,
        "spans": encoders.questions,
        "summaries": summaries.records,
    }
    return makers[kind](8)


@pytest.mark.parametrize(("kind", "edit"), [(kind, edit) for kind, edits in EDITS.items() for edit in edits])
def test_one_changed_detail_of_one_record_changes_the_fingerprint(folder: Path, kind: str, edit: str) -> None:
    records = records_of(kind, folder)
    edited = copy.deepcopy(records)
    EDITS[kind][edit](edited)
    assert edited != records
    before = build(kind, folder, records)
    assert build(kind, folder, records) == before
    after = build(kind, folder, edited)
    assert after["training data"] != before["training data"]
    assert after["training data"].partition(",")[0] == before["training data"].partition(",")[0]  # as many samples


PINNED = {
    "language": ["d577852cb03b", "a7d5890fe2f1"],
    "conversations": ["01347aad15cf", "aef05fe9be14"],
    "labelled": ["f1ee8d502223", "922c21d70416"],
    "spans": ["45a74cb16251", "0e68c913a298"],
    "summaries": ["374042bc55c5", "9c3b43a50613"],
}
"""Digests by the code that wrote the first checkpoints of format 2, which hold them: training and validation data."""


def fixed(kind: str, folder: Path) -> Any:
    """What reads a kind's records, from a tokenizer that is not trained: words are numbered by the alphabet."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import BertProcessing
    from transformers import PreTrainedTokenizerFast

    words = sorted({*re.findall(r"\w+|[^\w\s]+", json.dumps([records_of(kind, folder) for kind in EDITS]))})
    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*special, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind not in ("language", "conversations"):
        backend.post_processor = BertProcessing(("</s>", 3), ("<s>", 2))
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)
    if kind != "conversations":
        return tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    reader = PictureReader(folder / "pictures", CLIPImageProcessorPil(), pad=True, max_pixels=10_000)
    return PictureProcessor(tokenizer, reader, (28, 28), PictureTokens("<image>", 4, 4))


@pytest.mark.parametrize("kind", EDITS)
def test_checkpoints_written_before_know_the_same_data(folder: Path, kind: str) -> None:
    cut = {} if kind == "language" else {"cutoff_len": 90 if kind == "conversations" else 18}
    tokenizer = fixed(kind, folder)
    found = build(kind, folder, records_of(kind, folder), tokenizer, **cut, validation_samples=3)
    assert [text.partition("sha256 ")[2] for text in found.values()] == PINNED[kind]


@pytest.mark.parametrize("kind", EDITS)
def test_a_cache_holds_the_same_data_and_nothing_is_encoded_again(
    folder: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(cache: Path | None) -> dict[str, str]:
        where = None if cache is None else str(cache)
        return build(kind, folder, records_of(kind, folder), tokenizer, validation_samples=3, cache=where)

    tokenizer = fixed(kind, folder)
    plain, first = found(None), found(tmp_path)
    monkeypatch.setattr("dora_dist.data.reading._encoded", None)
    assert found(tmp_path) == first == plain


def test_where_a_text_ends_and_what_a_column_is_called_count() -> None:
    assert fingerprint({"a": ["b", "cd"]}) != fingerprint({"a": ["bc", "d"]})
    assert fingerprint({"a": torch.ones(2)}) != fingerprint({"b": torch.ones(2)})
    assert fingerprint({"a": torch.ones(2, 1)}) != fingerprint({"a": torch.ones(2)})
