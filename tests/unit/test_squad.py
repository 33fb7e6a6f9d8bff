"""Answers as spans: windows over long texts, where an answer is in them, and SQuAD's metrics."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.config import RunConfig
from dora_dist.data import RaggedDataset, SpanReader, read
from dora_dist.metrics.squad import Question, Window, normalised, predict, squad_metrics
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import problems
from tests import encoders


def load(tmp_path: Path, records: list[dict[str, Any]], **fields: Any) -> RaggedDataset:
    (tmp_path / "train.json").write_text(json.dumps(records))
    model = {"path": "org/model", "task": "question_answering"}
    data = {"train": str(tmp_path / "train.json"), "format": "squad", "cutoff_len": 40, "doc_stride": 6, **fields}
    config = RunConfig.from_dict({"model": model, "data": data}, rules=problems)
    return read(SpanReader(config.data, encoders.tokenizer()), config.data, seed=0, progress=False).train


@pytest.mark.parametrize("cutoff_len", [40, 20])
def test_the_label_of_every_window_spells_the_answer(tmp_path: Path, cutoff_len: int) -> None:
    records = encoders.questions(8)
    data = load(tmp_path, records, cutoff_len=cutoff_len)
    assert (len(data) == 8) == (cutoff_len == 40)
    tokenizer, found = encoders.tokenizer(), set()
    for i, window in enumerate(data.references.windows):
        first, last = (int(position) for position in data[i]["label"])
        assert len(data[i]["input_ids"]) == len(window.offsets) <= cutoff_len
        if (first, last) != (0, 0):
            [answer] = data.references.questions[window.question].answers
            assert tokenizer.decode(data[i]["input_ids"][first : last + 1]) == answer
            found.add(window.question)
    answerable = {i for i, record in enumerate(records) if record["answers"]["text"]}
    assert found == answerable < set(range(8))


def test_perfect_logits_give_perfect_answers_whatever_the_windows(tmp_path: Path) -> None:
    data = load(tmp_path, encoders.questions(8), cutoff_len=20)
    logits = torch.zeros(len(data), 24, 2)
    for i in range(len(data)):
        first, last = (int(position) for position in data[i]["label"])
        logits[i, first, 0] = logits[i, last, 1] = 5.0
    asked = data.references
    answers = predict(asked.questions, asked.windows, logits)
    assert squad_metrics(asked.questions, answers) == {"exact_match": 1.0, "f1": 1.0}
    assert "" in answers
    worse = squad_metrics(asked.questions, ["film"] * 8)
    assert worse["exact_match"] == 0.0


def test_an_answer_has_to_end_after_its_start_and_be_in_the_text() -> None:
    questions = [Question("red green blue", ("green",))]
    window = Window(0, [None, (0, 3), (4, 9), (10, 14)])
    logits = torch.tensor([[9.0, 9.0], [0.0, 5.0], [3.0, 3.0], [4.0, 0.0]])[None]
    assert predict(questions, [window], logits) == ["green"]  # not token 0; 3 + 3 for green, 4 + 0 for blue, 0 + 5 red


def test_metrics_by_hand() -> None:
    assert normalised("The  Cat, (a) dog!") == "cat dog"
    questions = [Question("", ("the cat", "a black cat")), Question("", ()), Question("", ("dog",))]
    metrics = squad_metrics(questions, ["black cat", "", "cat and dog"])
    assert metrics["exact_match"] == pytest.approx((1 + 1 + 0) / 3)
    assert metrics["f1"] == pytest.approx((1 + 1 + 2 * 1 / (3 + 1)) / 3)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["weak"], "answer_start": [0]}, "record 2: the answer 'weak' is not at character 0"),
        ({"text": ["weak"], "answer_start": []}, "lists of one length"),
        ("weak", '"answers" must be an object'),
    ],
)
def test_answers_that_are_none_are_refused(answers: Any, message: str, tmp_path: Path) -> None:
    records = encoders.questions(3)
    records[1]["answers"] = answers
    with pytest.raises(UserError, match=message):
        load(tmp_path, records)


def test_windows_that_hardly_move_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.doc_stride = 10: must be below half of data.cutoff_len = 20"):
        load(tmp_path, encoders.questions(3), cutoff_len=20, doc_stride=10)
