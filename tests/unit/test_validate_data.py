"""`dora-dist validate --data`: figures of what training would read, and samples with what is learnt of them marked."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dora_dist import cli
from dora_dist.cli.preview import _print_sample
from dora_dist.data.formats import training_prompt
from dora_dist.data.preview import Part, Preview, percentiles, segments
from tests import encoders, llava, summaries, toy
from tests.distributed.training_runs import config

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "")
    return tmp_path


def looked_at(capsys: pytest.CaptureFixture[str], base: str, *options: str, **sections: dict[str, Any]) -> str:
    """What is printed of the data of a run on `base`."""
    Path("run.json").write_text(json.dumps(config(Path(base), Path("data.json"), Path("run"), **sections)))
    status = cli.main(["validate", "run.json", "--data", *options])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "run.json is valid: DoRA r=4" in err
    return out


def rows(printed: str) -> dict[str, list[str]]:
    """The table's rows: counts of the training set, and of the validation set."""
    table = printed.partition("\n\n")[0].splitlines()[1:]
    return {line[: line.index("  ", 3)].strip(): line[line.index("  ", 3) :].split() for line in table if "  " in line}


def test_figures_and_marks_of_a_language_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.base_model(here / "base")
    (here / "base" / "model.safetensors").unlink()  # of the base, the tokenizer and the configuration are enough
    records = toy.records(25)
    for long in (3, 11):
        records[long]["instruction"] += " and again" * 60
    (here / "data.json").write_text(json.dumps(records))
    data = {"loss_on": "answer", "cutoff_len": 300, "validation_samples": 0}
    printed = looked_at(capsys, "base", "--no-files", data=data)
    text = toy.tokenizer()
    lengths = sorted(len(text(training_prompt(row) + row["output"]).input_ids) + 1 for row in records)[:23]
    found = rows(printed)
    assert (found["records"], found["samples"], found["left out: nothing to learn"]) == (["25"], ["23"], ["2"])
    assert (found["cut at cutoff_len = 300"], found["tokens"]) == (["2"], [f"{sum(lengths):,}"])
    assert found["tokens in a record, median"] == [str(lengths[11])]
    assert found["tokens in a record, longest"] == [str(lengths[-1])]
    assert "training, cut: records 4, 12\ntraining, left out: records 4, 12\n" in printed
    assert "\n6 steps of 6 records, 4 steps an epoch: 1.5 epochs\n" in printed
    assert "\nfirst sample: record 1, " in printed and "\nlongest sample: record " in printed
    assert printed.count("  │                 [[the correct answer is true</s>]]\n") == 2
    assert "Learnt is what is between [[ and ]]. The rest is read only." in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_only_the_turns_of_the_assistant_are_marked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.base_model(here / "base")
    (here / "base" / "chat_template.jinja").write_text(CHAT)
    turns = [("user", "[bold]one?\x1b[2J"), ("assistant", "yes"), ("user", "two?"), ("assistant", "no")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (here / "data.json").write_text(json.dumps([{"messages": messages}] * 3))
    data = {"format": "messages", "loss_on": "answer", "validation_samples": 1}
    printed = looked_at(capsys, "base", data=data)
    shown = [
        "  │ <|user|>[bold]one?␛[2J</s>",
        "  │ <|assistant|>[[yes</s>",
        "  │ ]]<|user|>two?</s>",
        "  │ <|assistant|>[[no</s>",
        "  │ ]]",
    ]
    assert printed.count("\n".join(shown)) == 2  # the first, and the last since both are of one length
    assert rows(printed)["samples"] == ["2", "1"]


def test_sources_are_shown_with_their_shares(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.base_model(here / "base")
    toy.write_records(here / "a.json", 6)
    Path("b.csv").write_text("prompt,completion\n" + "is it?,yes\n" * 4)
    short = {"path": "b.csv", "weight": 2, "format": "completion", "name": "short"}
    data = {"train": [{"path": "a.json", "weight": 0.5}, short], "validation_samples": 0, "cutoff_len": 300}
    printed = looked_at(capsys, "base", data=data)
    assert "  a: 20.0% of an epoch, 2 draws of 6 samples (0.33 passes)\n" in printed
    assert "  short: 80.0% of an epoch, 8 draws of 4 samples (2 passes)\n" in printed


def test_labels_answers_and_summaries(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoders.plain_encoder(here / "bert")
    encoders.write_labelled(here / "data.json", 10)
    any_module = {"target_modules": None}
    data: dict[str, Any] = {"format": "classification", "text_fields": ["sentence1", "sentence2"], "cutoff_len": 32}
    task = {"task": "sequence_classification"}
    printed = looked_at(capsys, "bert", model=task, adapter=any_module, data={**data, "validation_samples": 0})
    assert rows(printed)["label 0"] == ["6", "(60%)"] and rows(printed)["label 1"] == ["4", "(40%)"]
    shown = "  label: 0 (learnt)\n  │ [CLS] film 0 was awful [SEP] critic 0 agrees [SEP]\n"
    assert "first sample: record 1, 10 tokens\n" + shown in printed

    (here / "data.json").write_text(json.dumps(encoders.questions(9)))
    data = {"format": "squad", "cutoff_len": 24, "doc_stride": 6, "validation_samples": 0}
    printed = looked_at(capsys, "bert", model={"task": "question_answering"}, adapter=any_module, data=data)
    assert rows(printed)["questions"] == ["9"]
    assert "film 0 was[[ awful]] film 1 agrees" in printed.replace("\n  │ ", " ")

    summaries.base_model(here / "bart")
    (here / "data.json").write_text(json.dumps(summaries.records(9)))
    data = {"format": "summarisation", "text_fields": ["document"], "label_field": "summary", "cutoff_len": 16}
    data |= {"target_len": 12, "validation_samples": 0}
    printed = looked_at(capsys, "bart", model={"task": "seq2seq_lm"}, adapter=any_module, data=data)
    assert "  document:\n  │ <s>critic 0 saw film 0. it was awful.</s>\n" in printed
    assert "  summary:\n  │ [[<s>film 0 was awful</s>]]\n" in printed
    assert "  cut: document\n" in printed  # the longest
    assert int(rows(printed)["cut at cutoff_len = 16"][0]) > 0
    assert rows(printed)["tokens in a document, longest"] == ["16"]


def test_pictures_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava.model(here / "llava")
    llava.write(here, 8, 2)
    data = {"format": "llava", "image_folder": "pictures", "loss_on": "answer", "cutoff_len": 190}
    sections = {"model": {"task": "image_text_to_text"}, "adapter": {"target_modules": None}}
    printed = looked_at(capsys, "llava", **sections, data={**data, "validation_samples": 0})
    found = rows(printed)
    assert (found["records"], found["pictures"], found["without pictures"]) == (["11"], ["10"], ["2"])
    assert "  picture 1: a/0-red.jpg (4 tokens)\n" in printed
    assert "USER: <image>\n  │ is it red? ASSISTANT:[[ the answer is red</s>]]\n" in printed
    whole = int(found["tokens in a record, longest"][0])
    assert whole > 190 and f"  cut: after 190 of {whole} tokens\n" in printed


def test_percentiles_are_lengths_that_so_many_samples_have_at_most() -> None:
    found = percentiles("tokens", torch.arange(1, 101).flip(0))
    assert found == {"tokens, median": "51", "tokens, 90 %": "91", "tokens, 99 %": "100", "tokens, longest": "100"}
    assert set(percentiles("tokens", torch.tensor([7])).values()) == {"7"}


def test_pieces_join_to_the_whole_text() -> None:
    tokenizer = toy.tokenizer()
    ids = tokenizer("<s>is 1 even? the correct answer is false, é</s>").input_ids
    for border in range(len(ids) + 1):
        part = Part("", ids, [i >= border for i in range(len(ids))])
        pieces = list(segments(part, tokenizer))
        joined = "".join(text for text, _, _ in pieces)
        assert joined == tokenizer.decode(ids) or "�" in joined  # a border inside of a character
        assert [text for text, _, special in pieces if special][-1:] == ["</s>"]


@pytest.mark.parametrize("width", [80, 120])
def test_colours_on_a_terminal_and_long_texts_shortened(width: int) -> None:
    tokenizer = toy.tokenizer()
    ids = tokenizer("is 1 even?\n" * 40 + "true</s>" + "\nfalse" * 40).input_ids
    learnt = [False] * len(ids)
    answer = ids.index(tokenizer.eos_token_id)
    learnt[answer - 1 : answer + 1] = [True, True]
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system="standard", highlight=False)
    _print_sample(console, tokenizer, Preview(1, [Part("", ids, learnt)], {}), title="first")
    printed = console.file.getvalue()
    assert "\x1b[1;7;32m</s>\x1b[0m" in printed and "[[" not in printed
    hidden = [line for line in printed.splitlines() if "lines ..." in line]
    assert len(hidden) == 2 and "... 25 lines ..." in hidden[0]
    title, *shown = printed.splitlines()[1:]
    assert "first sample: record 1, " in title and len(shown) == 10 + 1 + 10 + 1 + 10
