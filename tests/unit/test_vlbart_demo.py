"""The VL-BART demo's own parts: questions about pictures that the package's tasks read, what is held out, the BART."""

import json
from collections import Counter
from pathlib import Path

import emoji_questions
import pytest
import stages
import vlbart_demo
from emoji_pictures import Emoji
from PIL import Image

from dora_dist.config import RunConfig
from dora_dist.data.subtasks import SUBTASKS
from dora_dist.tasks import problems

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (255, 255, 255)}
KINDS = ("Animals", "Flags", "Food")


@pytest.fixture
def emoji(tmp_path: Path) -> list[Emoji]:
    """Small coloured squares on white."""
    found = []
    for number in range(24):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste(list(COLOURS.values())[number % 4], (20, 20, 44, 44))
        picture.save(tmp_path / f"e{number}.png")
        found.append(
            Emoji(f"e{number}.png", f"thing {number}", KINDS[number % 3], f"{KINDS[number % 3].lower()}-small")
        )
    return found


def test_records_are_those_that_the_tasks_read(emoji: list[Emoji], tmp_path: Path) -> None:
    first, later = emoji_questions.seen(emoji, tmp_path, 0), emoji_questions.unseen(emoji)
    assert set(later) == {emoji_questions.UNSEEN} and not set(first) & set(later)
    for task, records in (first | later).items():
        for record in records:
            asked = SUBTASKS[task].read(record)
            question, answer = emoji_questions.texts(task, record)
            assert (asked.text, asked.targets) == (question, ((answer, 1.0),))
    kinds = {emoji_questions.identity(one): one.kind for one in emoji}
    for record in first["vqa"]:
        if record["sent"].startswith("is it "):
            said = record["sent"].removeprefix("is it ").removesuffix("?") == kinds[record["img_id"]]
            assert record["label"] == {"yes" if said else "no": 1.0}
    for record in first["nlvr2"]:
        shown = {kinds[record["img0"]], kinds[record["img1"]]}
        assert record["label"] == (record["sent"] == f"both pictures show {shown.pop()}" and not shown)
    assert Counter(record["label"] for record in first["nlvr2"]) == {0: 24, 1: 24}


def test_the_main_colour_is_that_of_the_thing_and_not_of_its_background(emoji: list[Emoji], tmp_path: Path) -> None:
    for number, one in enumerate(emoji[:4]):
        assert emoji_questions.main_colour(tmp_path / one.file) == list(COLOURS)[number]


def test_the_bart_to_begin_with_writes_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dora_dist.models.folder import ModelFolder
    from dora_dist.models.tokenizer import load_tokenizer

    monkeypatch.setattr(vlbart_demo, "BASE", tmp_path / "base")
    vlbart_demo.make_base(["what kind of thing is this?", "Animals"] * 3)
    tokenizer = load_tokenizer(tmp_path / "base")
    ids = tokenizer("Animals").input_ids
    assert (ids[0], ids[-1]) == (0, 2) and tokenizer.decode(ids, skip_special_tokens=True) == "Animals"
    assert ModelFolder.open(tmp_path / "base").config["vocab_size"] == len(tokenizer)


def test_the_shipped_configs_name_the_demos_folders() -> None:
    before, after = (RunConfig.load(stages.ROOT / name, rules=problems) for name in vlbart_demo.CONFIGS)
    assert [Path(config.model.path) for config in (before, after)] == [vlbart_demo.BASE, vlbart_demo.PRETRAINED]
    assert before.model.feature_dim == 384 and after.model.feature_dim is None
    assert Path(before.checkpoint.run_dir) == vlbart_demo.PRETRAIN
    assert {Path(str(config.data.features)) for config in (before, after)} == {vlbart_demo.FEATURES}
    assert set(after.data.train) == {emoji_questions.UNSEEN} and not set(before.data.train) & set(after.data.train)
    for options in vlbart_demo.METHODS.values():
        RunConfig.load(stages.ROOT / vlbart_demo.CONFIGS[1], options, rules=problems)


def test_the_most_frequent_answer_is_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlbart_demo, "DATA", tmp_path)
    found = [{"img_id": "a", "sent": emoji_questions.GROUP, "label": {answer: 1.0}} for answer in "xyxx"]
    (tmp_path / "gqa-held-out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    records = vlbart_demo.read_held_out()
    assert records[0] == ("a.png", "x")
    assert vlbart_demo.most_frequent(records) == ("x", 0.75)
