"""Which records a run has its model answer, and that their prompts are what training has before the answer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dora_dist.config import RunConfig
from dora_dist.data import TokenizedData, read
from dora_dist.tasks import task_named
from dora_dist.training.samples import Sample, batches_of, choose
from tests import llava, toy

TEMPLATE = (
    "{% if tools %}tools: {{ tools[0]['name'] }}\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TURNS = [("system", "be short"), ("user", "is 2 even?"), ("assistant", "true"), ("user", "is 3?")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
ANSWER = {"role": "assistant", "content": "the correct answer is false"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy.base_model(tmp_path_factory.mktemp("samples") / "base")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def chosen(base: Path, data: Mapping[str, Any], **logging: int) -> tuple[TokenizedData, list[Sample], RunConfig]:
    """What a run of these records reads, and the samples that it chooses."""
    task = data.get("task", "causal_lm")
    data = {name: value for name, value in data.items() if name != "task"}
    config = RunConfig.from_dict(
        {"model": {"path": str(base), "task": task}, "data": data, "logging": {"samples": 3, **logging}}
    )
    processor = task_named(task).processor(base, config.model, config.data)
    reader = task_named(task).reader(processor, model=config.model, data=config.data)
    rows = read(reader, config.data, seed=7, progress=False)
    assert rows.validation is not None
    return rows, choose(config, base, task_named(task).tokenizer(processor), rows.validation), config


def written(file: Path, records: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, records)))
    return str(file)


def conversation(field: str, roles: dict[str, str]) -> dict[str, Any]:
    turns = [*MESSAGES, ANSWER]
    if field == "messages":  # the system's turn apart, and more than one answer
        return {"messages": turns[1:], "system": turns[0]["content"], "tools": [{"name": "sum"}]}
    return {field: [{"from": roles[turn["role"]], "value": turn["content"]} for turn in turns]}


RECORDS: dict[str, dict[str, Any]] = {
    "instruction": {"instruction": "Is 2 even?", "output": "the correct answer is true"},
    "alpaca": {"instruction": "Is it even?", "input": "2", "output": "true"},
    "completion": {"prompt": "The answer is", "completion": " true"},
    "template": {"question": "Is 2 even?", "said": "true"},
    "messages": conversation("messages", {}),
    "sharegpt": conversation("conversations", {"system": "system", "user": "human", "assistant": "gpt"}),
}
EXPECTED = {"messages": ANSWER["content"], "sharegpt": ANSWER["content"], "template": "true"}


@pytest.mark.parametrize("format", RECORDS)
def test_a_prompt_is_what_training_has_before_the_answer(format: str, base: Path, tmp_path: Path) -> None:
    """With the loss on all tokens, too, where labels do not tell where it ends."""
    record = RECORDS[format]
    train, validation = (written(tmp_path / f"{split}.jsonl", [record] * 2) for split in ("train", "validation"))
    own = {"prompt_template": "Q: {question}\nA:\n", "answer_field": "said"} if format == "template" else {}
    data = {"train": train, "validation": validation, "format": format, "loss_on": "all", "cutoff_len": 400, **own}
    rows, samples, _ = chosen(base, data)
    assert len(samples) == 2
    assert rows.validation is not None
    row, ids = rows.validation[0]["input_ids"], samples[0].prompt.ids
    assert row[: len(ids)] == ids
    expected = EXPECTED.get(format) or list(record.values())[-1]
    assert samples[0].expected == expected
    rest = rows.validation.reader.tokenizer.decode(row[len(ids) :], skip_special_tokens=True)
    assert rest.strip() == expected.strip()


def test_the_first_records_held_out_that_can_be_asked_are_taken(base: Path, tmp_path: Path) -> None:
    """Of a mixture each in its own format; an answer without words, and a prompt that is too long, are passed over."""
    plain = [{"prompt": f"question {i}:", "completion": f" yes {i}"} for i in range(12)]
    for i in range(0, 12, 3):
        plain[i]["completion"] = " "
    for i in range(1, 12, 3):
        plain[i]["prompt"] *= 100
    sources = [
        {"path": written(tmp_path / "a.jsonl", plain), "format": "completion", "weight": 2},
        {"path": written(tmp_path / "b.jsonl", toy.records(12))},
    ]
    data = {"train": sources, "validation_samples": 18, "cutoff_len": 450, "loss_on": "all"}
    rows, samples, _ = chosen(base, data, samples=20)
    assert rows.validation is not None
    numbers = rows.validation.records.tolist()
    wanted = [plain[i]["completion"] for i in numbers if i < 12 and i % 3 == 2]
    wanted += [toy.records(12)[i - 12]["output"] for i in numbers if i >= 12]
    assert [sample.expected for sample in samples] == wanted
    assert chosen(base, data, samples=2)[1] == samples[:2]


def test_conversations_with_pictures_are_asked_to_their_last_turn(tmp_path: Path) -> None:
    """Pictures are read on each node from its own folder of them."""
    base = llava.model(tmp_path / "base")
    file = str(llava.write(tmp_path, 6, 3))
    data = {
        "task": "image_text_to_text",
        "format": "llava",
        "loss_on": "answer",
        "cutoff_len": 450,
        "image_folder": f"{tmp_path}/pictures",
    }
    rows, samples, config = chosen(base, {**data, "train": file, "validation": file}, samples=20)
    assert rows.validation is not None
    for sample, row in zip(samples, rows.validation, strict=True):
        assert row["input_ids"][: len(sample.prompt.ids)] == sample.prompt.ids
        assert len(sample.prompt.pictures) == len(row["pictures"])
    own = (tmp_path / "pictures").rename(tmp_path / "of another node")
    there = config.model_copy(update={"data": config.data.model_copy(update={"image_folder": str(own)})})
    batches = batches_of(there, base, rows.validation.reader.tokenizer, samples)
    for batch in batches:
        pictures = [len(sample.prompt.pictures) for sample in batch.samples]
        assert all(pictures) or not any(pictures)  # with pictures or without: one kind of forward
        assert len(batch.inputs.get("pixel_values", ())) == sum(pictures)
    assert [sample for batch in batches for sample in batch.samples] == samples


def test_no_batch_of_prompts_is_larger_than_one_of_training(base: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "data.jsonl", [{"prompt": f"{i}:" * 20, "completion": " yes"} for i in range(9)])
    data = {"train": file, "validation": file, "format": "completion", "cutoff_len": 100}
    rows, samples, config = chosen(base, data, samples=9, sample_tokens=20)
    assert rows.validation is not None
    batches = batches_of(config, base, rows.validation.reader.tokenizer, samples)
    most = config.training.micro_batch_size * 100
    assert 1 < len(batches) < 9
    for batch in batches:
        assert len(batch.samples) * (20 + max(len(sample.prompt.ids) for sample in batch.samples)) <= most
