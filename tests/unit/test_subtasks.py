"""VL-BART's tasks: what each makes of its records, its prompt, its scores; which records are refused, and how."""

from typing import Any

import pytest

from dora_dist.data.subtasks import SUBTASKS, Example, scores_of
from dora_dist.metrics.choices import chosen_option
from dora_dist.runtime.errors import UserError

QUESTION = {"img_id": "COCO_val2014_01", "sent": "what is it?", "label": {"cat": 0.3, "a cat": 1}}
CHOICES = {"vid_name": "v1", "q": "who left?", "ts": [1.5, 12], "a0": "Ann", "a1": " Bob ", "answer_idx": 1}

# task -> record, text with the prompt, text in front of it, targets, ids
READ: dict[str, tuple[str, dict[str, Any], str, str, tuple[tuple[str, float], ...], tuple[str, ...]]] = {
    "vqa": ("vqa", QUESTION, "vqa: what is it?", "", (("a cat", 1), ("cat", 0.3)), ("COCO_val2014_01",)),
    "vqa of annotators": (
        "vqa",
        {"image_id": 7, "question": "who?", "answers": [{"answer": "Ann"}] * 2 + [{"answer": "Bob"}] * 8},
        "vqa: who?",
        "",
        (("Bob", 1), ("Ann", 2 / 3)),
        ("7",),
    ),
    "vqa that nobody agrees on": (
        "vqa",
        {**QUESTION, "label": {}},
        "vqa: what is it?",
        "",
        (("", 0),),
        ("COCO_val2014_01",),
    ),
    "gqa": ("gqa", {"imageId": "n1", "question": "why?", "answer": "rain"}, "gpa: why?", "", (("rain", 1),), ("n1",)),
    "nlvr2": (
        "nlvr2",
        {"img0": "a", "img1": "b", "sent": "two dogs", "label": 1},
        "nlvr: two dogs",
        "",
        (("true", 1),),
        ("a", "b"),
    ),
    "nlvr2 as published": (
        "nlvr2",
        {"identifier": "dev-850-1-0", "sentence": "two dogs", "label": "False"},
        "nlvr: two dogs",
        "",
        (("false", 1),),
        ("dev-850-1-img0", "dev-850-1-img1"),
    ),
    "caption of Karpathy": (
        "caption",
        {"filename": "COCO_val2014_02.jpg", "sentences": [{"raw": "A cat. "}, {"raw": "A dog."}]},
        "caption: ",
        "",
        (("A cat.", 1), ("A dog.", 1)),
        ("COCO_val2014_02",),
    ),
    "caption": ("caption", {"img_id": "i.1", "sent": "a cat"}, "caption: ", "", (("a cat", 1),), ("i.1",)),
    "tvqa": (
        "tvqa",
        {**CHOICES, "sub": [{"text": "Bye! "}, {"text": " "}, {"text": "Door."}]},
        "[Q] who left? [TS] ([1.5, 12]) [Choices] a0: Ann. a1: Bob. tvqa: ",
        "[Subs] Bye! Door.",
        (("a1", 1),),
        ("v1",),
    ),
    "how2qa": (
        "how2qa",
        {**CHOICES, "a0": ". Ann. ", "answer_idx": ". Ann. ", "ts": "0-3"},
        "[Q] who left? [TS] (0-3) [Choices] a0: Ann. a1: Bob. how2qa: ",
        "",
        (("a0", 1),),
        ("v1",),
    ),
    "how2qa by the text of a bare option": (
        "how2qa",
        {**CHOICES, "a0": ". Ann. ", "answer_idx": "Ann"},
        "[Q] who left? [TS] ([1.5, 12]) [Choices] a0: Ann. a1: Bob. how2qa: ",
        "",
        (("a0", 1),),
        ("v1",),
    ),
    "how2qa by number in a text": (
        "how2qa",
        {"vid_name": "v1", "q": "how many?", "choices": ["3", "1", "0"], "answer_idx": "0"},
        "[Q] how many? [Choices] a0: 3. a1: 1. a2: 0. how2qa: ",
        "",
        (("a0", 1),),
        ("v1",),
    ),
    "how2qa by answer": (
        "how2qa",
        {"vid_name": "v1", "q": "how many?", "choices": ["3", "1", "0"], "answer": "0", "sub": ["", " "]},
        "[Q] how many? [Choices] a0: 3. a1: 1. a2: 0. how2qa: ",
        "",
        (("a2", 1),),
        ("v1",),
    ),
    "tvc": (
        "tvc",
        {
            "vid_name": "v2",
            "ts": [3, 4],
            "descs": [{"desc": "Ann goes."}, {"desc": "She leaves."}],
            "subtitles": "Bye!",
        },
        "[TS] ([3, 4]) tvc: ",
        "[Subs] Bye!",
        (("Ann goes.", 1), ("She leaves.", 1)),
        ("v2",),
    ),
    "yc2c": (
        "yc2c",
        {"video_id": "v3", "captions": ["cut it"], "ts": [3, 4], "sub": "Cut!"},
        "yc2c: ",
        "[Subs] Cut!",
        (("cut it", 1),),
        ("v3",),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_each_task_reads_its_records(case: str) -> None:
    name, record, text, before, targets, ids = READ[case]
    example = SUBTASKS[name].read(record)
    found = SUBTASKS[name].prompted(example, None)
    assert found.text == " ".join(part for part in (before, text) if part) and found.before == len(before)
    assert found.text[found.prompt.start : found.prompt.stop] == SUBTASKS[name].prompt
    assert (example.before, example.visual) == (before, ids)
    assert example.targets == tuple((target, pytest.approx(score)) for target, score in targets)
    assert {READ[each][0] for each in READ} == set(SUBTASKS)


def test_a_prompt_can_be_another() -> None:
    example = Example(visual=(), text="why?", targets=(), reference=None)
    assert SUBTASKS["gqa"].prompted(example, "gqa: ").text == "gqa: why?"
    assert SUBTASKS["tvqa"].prompted(example, "which?").text == "why? which?"
    assert SUBTASKS["tvqa"].prompted(example, "") == ("why?", range(4, 4), 0)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no picture": ("vqa", {"sent": "x", "label": {"a": 1}}, 'has no "img_id" (nor image_id, imageId, image)'),
    "picture of a list": ("vqa", {**QUESTION, "img_id": ["a"]}, '"img_id" must be the id of a picture'),
    "no question": ("vqa", {"img_id": "a", "label": {"a": 1}}, 'has no "sent" (nor question)'),
    "question of a number": ("vqa", {**QUESTION, "sent": 3}, '"sent" must be a text, found 3'),
    "score above 1": ("vqa", {**QUESTION, "label": {"a": 2}}, "answers with scores from 0 to 1"),
    "label of a text": ("gqa", {**QUESTION, "label": "cat"}, 'found "cat"'),
    "no answer": ("gqa", {"img_id": "a", "sent": "x"}, 'has no "answers" (nor answer)'),
    "third truth": ("nlvr2", {"img0": "a", "img1": "b", "sent": "x", "label": 2}, '"label" must be true or false'),
    "truth of a list": ("nlvr2", {"img0": "a", "img1": "b", "sent": "x", "label": []}, "found []"),
    "truth of an object": ("nlvr2", {"img0": "a", "img1": "b", "sent": "x", "label": {}}, "found {}"),
    "truth of a fraction": ("nlvr2", {"img0": "a", "img1": "b", "sent": "x", "label": 0.0}, "found 0.0"),
    "one picture": ("nlvr2", {"img0": "a", "sent": "x", "label": 1}, 'has no "img1"'),
    "no caption": ("caption", {"img_id": "a", "sentences": []}, '"sentences" must be a text or a list of texts'),
    "empty caption": ("caption", {"img_id": "a", "sent": " "}, "must be a text or a list of texts"),
    "one choice": ("tvqa", {"vid_name": "v", "q": "x", "a0": "y", "answer_idx": 0}, 'the choices "a0", "a1"'),
    "answer beyond": ("tvqa", {**CHOICES, "answer_idx": 2}, '"answer_idx" must be a number from 0 to 1, found 2'),
    "subtitles of a number": ("tvqa", {**CHOICES, "sub": [{"text": 3}]}, '"sub" must be a text or a list of texts'),
    "half a stretch": ("how2qa", {**CHOICES, "ts": [1]}, '"ts" must be the two ends of a stretch'),
    "no description": ("tvc", {"vid_name": "v"}, 'has no "descs"'),
    "half a character": ("yc2c", {"vid_name": "v", "descs": ["\ud800"]}, "holds half a character"),
}


@pytest.mark.parametrize("case", BAD)
def test_records_that_cannot_be_meant_are_refused(case: str) -> None:
    name, record, message = BAD[case]
    with pytest.raises(UserError) as caught:
        SUBTASKS[name].read(record)
    assert message in str(caught.value)


def test_scores_by_hand() -> None:
    label, ten = {"a cat": 1.0, "dog": 0.3}, ["cat"] * 3 + ["dog"] * 7
    cases = [
        ("vqa", "Cat.", {"label": label, "answers": []}, 1),  # the article and the period do not count
        ("vqa", "dog", {"label": label, "answers": []}, 0.3),
        ("vqa", "cat", {"label": label, "answers": ten}, (3 * 2 / 3 + 7 * 1) / 10),
        ("gqa", "dog", {"label": label, "answers": []}, 0),
        ("gqa", " a cat", {"label": label, "answers": []}, 1),
        ("gqa", "", {"label": {}, "answers": []}, 0),  # nobody knows
        ("nlvr2", "True", "true", 1),
        ("nlvr2", "no", "false", 0),
        ("tvqa", "a1", {"options": ["x", "y"], "answer": 1}, 1),
        ("tvqa", "X.", {"options": ["x", "y"], "answer": 0}, 1),
        ("tvqa", "7", {"options": ["x", "y"], "answer": 0}, 0),
    ]
    found = scores_of(*zip(*[case[:3] for case in cases], strict=True))
    for task in ("vqa", "gqa", "nlvr2", "tvqa"):
        own = [score for name, _, _, score in cases if name == task]
        assert found[f"{task}_accuracy"] == pytest.approx(sum(own) / len(own))
    assert found["average"] == pytest.approx(sum(found[f"{t}_accuracy"] for t in ("vqa", "gqa", "nlvr2", "tvqa")) / 4)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("a1", ["x", "y"], 1),
        ("a1: y.", ["x", "z"], 1),
        ("a2", ["x", "y"], None),
        ("a 1", ["x", "y"], None),
        ("1", ["x", "y"], 1),
        ("(1)", ["x", "y"], 1),
        ("(1) y", ["x", "z"], 1),
        ("10 minutes", ["an hour", "10 minutes"], 1),
        ("1 minute", ["1 minute", "2 minutes"], 0),
        ("1", ["1", "0"], 1),  # what was asked for is a number
        ("7", ["3", "7"], 1),
        ("1y", ["x", "y"], None),
        ("9 of them", ["x", "y"], None),
    ],
)
def test_the_option_that_a_text_means(text: str, options: list[str], expected: int | None) -> None:
    assert chosen_option(text, options) == expected


def test_a_choice_is_compared_as_the_prompt_has_it() -> None:
    reference = SUBTASKS["how2qa"].read({**CHOICES, "a0": ". Ann. "}).reference
    assert reference == {"options": ["Ann", "Bob"], "answer": 1}
    assert SUBTASKS["how2qa"].score(["Ann"], [{**reference, "answer": 0}]) == {"accuracy": 1.0}


def test_captions_are_scored_by_cider() -> None:
    from dora_dist.metrics.captions import caption_metrics

    said, right = ["a red cat", "two dogs run"], [["a red cat", "the cat"], ["dogs run", "two dogs"]]
    found = scores_of(["tvc", "tvc"], said, right)
    assert found == {f"tvc_{k}": v for k, v in caption_metrics(said, right).items()} | {"average": found["tvc_cider"]}
    assert found["tvc_cider"] > 1
