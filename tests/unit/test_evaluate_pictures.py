"""`evaluate` of LLaVA models: what they are asked, their answers alone and in batches, and records that do not fit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dora_dist import cli
from dora_dist.config import DataConfig
from dora_dist.data.conversations import VICUNA_SYSTEM, Conversation, render, render_question
from dora_dist.data.texts import encode
from dora_dist.evaluation import as_table, evaluate
from dora_dist.evaluation.inference import load_for_inference
from dora_dist.models.families import load_processor
from dora_dist.models.llava.assemble import assemble_llava
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.pictures import answer_questions, candidate_scores, likeliest_answers
from dora_dist.tasks.evaluations.questions import PictureQuestion, read_questions
from tests import llava, toy

NAMES = [f"{i}.png" for i in range(6)]
VQA = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models as small as these, threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a LLaVA whose answers depend on pictures, and pictures that need no resizing."""
    from transformers import LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("evaluate-pictures")
    llava.model(folder / "base")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(10)
        for name, parameter in model.model.language_model.layers.named_parameters():
            parameter.mul_(1 if "norm" in name else 8)
    model.save_pretrained(folder / "base")
    (folder / "pictures").mkdir()
    for seed, name in enumerate(NAMES):
        noise = np.random.default_rng(seed).integers(0, 256, (llava.SIDE, llava.SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / name)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return load_processor(folder / "base", DataConfig(train="-", image_folder=str(folder / "pictures")))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_for_inference(str(folder / "base"), "fp32")[0]


def question(text: str, *pictures: str, **fields: Any) -> PictureQuestion:
    return PictureQuestion("id", "a.jsonl, line 1", text, pictures, **fields)


MIXED = [
    question("<image>\nis it red?", "0.png"),
    question("is 3 even?"),
    question("<image>\nis it very very red, please answer?", "1.png"),
    question("first <image> then <image> which?", "2.png", "3.png"),
    question("<image>\nis it red?", "4.png"),
    question("is 4 even, or is it very even?"),
    question("<image>\nis it red?", "5.png"),
]


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "model"])
def test_the_prompt_is_the_training_text_up_to_the_answer(template: str, processor: Any) -> None:
    text = "<image>\nis it red?"
    conversation = Conversation((("user", text), ("assistant", "no, blue")), ("a.png",))
    rendered = render(conversation, template, processor.tokenizer, "<image>", True)
    prompt = render_question(text, template, processor.tokenizer, "<image>")
    assert prompt == rendered.text[: rendered.answers[0][0]]
    [(ids, answer)] = encode(processor.tokenizer, [rendered])
    assert processor.tokenizer(prompt, add_special_tokens=False).input_ids == ids[: answer.index(True)]
    if template == "vicuna_v1":
        assert prompt == f"{VICUNA_SYSTEM} USER: <image>\nis it red? ASSISTANT:"


def asked(folder: Path, record: dict[str, Any], format: str, **options: Any) -> PictureQuestion:
    (folder / "one.jsonl").write_text(json.dumps(record) + "\n")
    [read] = read_questions(str(folder / "one.jsonl"), format, **options)
    return read


CHOICE = {"id": "c", "question": "Which?", "choices": ["cat", "dog", "bird"], "answer": 1}


@pytest.mark.parametrize(
    ("format", "record", "options", "text"),
    [
        ("vqa", {"text": "red?", "image": "a.png", "answer": "no"}, {}, f"<image>\nred?{VQA}"),
        ("vqa", {"question": "red?", "answer": "no"}, {}, f"red?{VQA}"),
        ("vqa", {"text": f"red?{VQA}", "answer": "no"}, {}, f"red?{VQA}"),
        ("vqa", {"text": "red?", "answer": "no"}, {"instruction": ""}, "red?"),
        ("vqa", {"text": "red?", "answer": "no"}, {"instruction": "Be brief."}, "red?\nBe brief."),
        ("vqa", {"text": "<image> or <image>?", "image": ["a", "b"], "answer": "no"}, {}, f"<image> or <image>?{VQA}"),
        ("vqa", {"text": "same?", "image": ["a", "b"], "answer": "no"}, {}, f"<image>\n<image>\nsame?{VQA}"),
        (
            "multiple_choice",
            {**CHOICE, "hint": "Animals.", "image": "a.png"},
            {},
            "<image>\nAnimals.\nWhich?\nA. cat\nB. dog\nC. bird\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        ("pope", {"text": "Is there a dog?", "image": "a", "label": "yes"}, {}, f"<image>\nIs there a dog?{VQA}"),
        (
            "captions",
            {"image": "a", "captions": ["x"]},
            {},
            "<image>\nProvide a one-sentence caption for the provided image.",
        ),
        ("captions", {"text": "Describe it.", "image": "a", "captions": ["x"]}, {}, "<image>\nDescribe it."),
    ],
)  # fmt: skip
def test_what_is_asked(format: str, record: dict[str, Any], options: dict[str, Any], text: str, tmp_path: Path) -> None:
    assert asked(tmp_path, record, format, **options).text == text


@pytest.mark.parametrize("answer", [1, "B", "dog"])
def test_the_right_choice_is_a_position_a_letter_or_a_text(answer: Any, tmp_path: Path) -> None:
    read = asked(tmp_path, {**CHOICE, "answer": answer}, "multiple_choice")
    assert (read.references, read.candidates, read.id) == (("B",), ("A", "B", "C"), "c")


def test_references_are_texts_or_the_official_annotations(tmp_path: Path) -> None:
    official = {"question_id": 7, "text": "red?", "answers": [{"answer": "no", "answer_id": 1}, {"answer": "yes"}]}
    read = asked(tmp_path, official, "vqa")
    assert (read.id, read.references) == (7, ("no", "yes"))
    assert asked(tmp_path, {"image": "a", "references": ["x", "y"]}, "captions").references == ("x", "y")
    assert asked(tmp_path, {"text": "red?", "label": "NO"}, "pope").references == ("No",)


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_answer_does_not_depend_on_its_batch(num_beams: int, model: Any, processor: Any) -> None:
    options = {"num_beams": num_beams, "max_new_tokens": 8}
    together = answer_questions(model, processor, MIXED, batch_size=4, **options)
    assert together == [answer_questions(model, processor, [one], **options)[0] for one in MIXED]
    assert len({together[i] for i in (0, 4, 6)}) > 1  # the same question about different pictures


def theirs(model: Any, folder: Path, one: PictureQuestion, num_beams: int = 1, template: str = "vicuna_v1") -> str:
    """The answer by transformers' own processor and `generate`."""
    from transformers import AutoProcessor

    their: Any = AutoProcessor.from_pretrained(folder / "base")
    text = render_question(one.text, template, their.tokenizer, "<image>")
    images = [Image.open(folder / "pictures" / name).convert("RGB") for name in one.pictures]
    inputs = their(text=text, images=images or None, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=num_beams)
    return their.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_those_of_transformers_alone(num_beams: int, model: Any, processor: Any, folder: Path) -> None:
    found = answer_questions(model, processor, MIXED, num_beams=num_beams, max_new_tokens=8)
    assert found == [theirs(model, folder, one, num_beams) for one in MIXED]


def test_the_folders_generation_settings_do_not_leak(model: Any, processor: Any) -> None:
    expected = answer_questions(model, processor, MIXED, max_new_tokens=8)
    before = model.generation_config.to_dict()
    try:
        model.generation_config.update(repetition_penalty=5.0, do_sample=True, no_repeat_ngram_size=1, num_beams=2)
        assert answer_questions(model, processor, MIXED, max_new_tokens=8) == expected
    finally:
        model.generation_config.update(**before)


def test_a_caption_under_the_plain_template_ends_with_its_line(model: Any, processor: Any, folder: Path) -> None:
    shown = question("<image>\nwhatever", "1.png")
    whole = theirs(model, folder, shown, template="plain")
    assert answer_questions(model, processor, [shown], template="plain", max_new_tokens=8) == [whole]
    tokenizer = processor.tokenizer
    tokens = tokenizer(whole).input_ids
    first = next(i for i, token in enumerate(tokens) if tokens.count(token) == 1 and i > 0)
    rows, weight = [tokens[first], *tokenizer("\n").input_ids], model.lm_head.weight.data
    try:  # a model that ends the line where this one says a certain token
        weight[rows] = weight[rows[::-1]]
        assert "\n" in theirs(model, folder, shown, template="plain")
        found = answer_questions(model, processor, [shown], template="plain", max_new_tokens=8)
    finally:
        weight[rows] = weight[rows[::-1]]
    assert found == [tokenizer.decode(tokens[:first]).strip()]


def test_scores_of_candidates_are_those_of_whole_texts(model: Any, processor: Any) -> None:
    shown = [question(one.text, *one.pictures, candidates=("Yes", "No", "it is very red")) for one in MIXED]
    expected = [plain_scores(model, processor, one, "vicuna_v1", " ") for one in shown]
    assert abs(expected[0][0] - expected[4][0]) > 1e-3  # the same question about different pictures
    found = candidate_scores(model, processor, shown, batch_size=3)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)
    likeliest = [one.candidates[row.index(max(row))] for one, row in zip(shown, expected, strict=True)]
    assert likeliest_answers(model, processor, shown) == likeliest


def test_what_a_chat_template_puts_after_an_answer_is_not_scored(model: Any, processor: Any) -> None:
    before = processor.tokenizer.chat_template
    processor.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    try:
        shown = [question(one.text, *one.pictures, candidates=("Yes", "No", "it is very red")) for one in MIXED[:3]]
        expected = [plain_scores(model, processor, one, "model", "") for one in shown]
        found = candidate_scores(model, processor, shown, template="model")
        means = candidate_scores(model, processor, shown, template="model", normalise="mean")
    finally:
        processor.tokenizer.chat_template = before
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)
    counts = torch.tensor([len(processor.tokenizer(text).input_ids) for text in shown[0].candidates])
    torch.testing.assert_close(torch.tensor(means) * counts, torch.tensor(expected), atol=1e-4, rtol=0)


def test_an_image_token_of_id_0_is_not_taken_for_padding(folder: Path, tmp_path: Path) -> None:
    text = toy.tokenizer()
    text.pad_token = "</s>"  # so that "<pad>", whose id is 0, is free
    language = llava.language_model(tmp_path / "language")
    text.save_pretrained(language)
    assemble_llava(llava.tower(tmp_path / "tower"), language, tmp_path / "base", image_token="<pad>")
    data = DataConfig(train="-", image_folder=str(folder / "pictures"))
    processor, model = load_processor(tmp_path / "base", data), load_for_inference(str(tmp_path / "base"), "fp32")[0]
    assert (processor.stands.token_id, processor.tokenizer.pad_token_id) == (0, 2)
    shown = [question(one.text, *one.pictures, candidates=("Yes", "No")) for one in MIXED]
    together = candidate_scores(model, processor, shown, batch_size=4)
    alone = [candidate_scores(model, processor, [one])[0] for one in shown]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), atol=1e-4, rtol=0)


def plain_scores(model: Any, processor: Any, one: PictureQuestion, template: str, space: str) -> list[float]:
    """A forward per candidate; the log-probabilities of what follows the prompt."""
    pictures = [processor.reader(name) for name in one.pictures]
    pixels = {"pixel_values": torch.stack(pictures)} if pictures else {}
    tokenizer, scores = processor.tokenizer, []
    prompt = render_question(one.text, template, tokenizer, "<image>").replace("<image>", "<image>" * 4)
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    for candidate in one.candidates:
        ids = tokenizer(f"{prompt}{space}{candidate}</s>", add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            log_probs = model(input_ids=ids, **pixels).logits[0].log_softmax(-1)
        scores.append(sum(float(log_probs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1] - 1)))
    return scores


# --- the command ----------------------------------------------------------------------------------------------------


def write(folder: Path, format: str) -> Path:
    common = [{"question_id": i, "image": name, "text": f"is it {i}?"} for i, name in enumerate(NAMES)]
    wanted: dict[str, dict[str, Any]] = {
        "vqa": {"answers": ["true"] * 10},
        "multiple_choice": {"choices": ["true", "false"], "answer": "A"},
        "pope": {"label": "yes"},
        "captions": {"captions": ["the answer is true", "it is red"]},
    }
    file = folder / f"{format}.json"
    file.write_text(json.dumps([{**record, **wanted[format]} for record in common]))
    return file


@pytest.mark.parametrize(
    ("format", "mode", "columns"),
    [
        ("vqa", "generate", "accuracy"),
        ("multiple_choice", "generate", "accuracy correct"),
        ("multiple_choice", "likelihood", "accuracy correct"),
        ("pope", "likelihood", "accuracy precision recall f1 yes_ratio"),
        ("captions", "generate", "cider bleu4 rougeL"),
    ],
)
def test_the_command_prints_the_formats_metrics(
    format: str, mode: str, columns: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "out" / f"{format}.json"
    command = ["evaluate", str(folder / "base"), "--tasks", f"dev={write(folder, format)}", "--format", format]
    command += ["--mode", mode, "--image-folder", str(folder / "pictures"), "--dtype", "fp32", "--limit", "4"]
    assert cli.main([*command, "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(output.read_text())
    row = result["tasks"]["dev"]
    assert lines == as_table(result).splitlines()
    assert lines[0].split() == ["task", *columns.split(), "total"]
    assert [prediction["id"] for prediction in row["predictions"]] == [0, 1, 2, 3]
    assert all(isinstance(prediction["answer"], str) for prediction in row["predictions"])
    assert result["settings"]["data"]["image_folder"] == str(folder / "pictures")
    if mode == "likelihood":
        assert {p["answer"] for p in row["predictions"]} <= ({"A", "B"} if "choice" in format else {"Yes", "No"})
        assert row["accuracy"] == sum(p["answer"] in ("A", "Yes") for p in row["predictions"]) / 4


@pytest.fixture(scope="module")
def unloadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What says that it is a LLaVA, and cannot be loaded."""
    folder = tmp_path_factory.mktemp("unloadable")
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    return folder


FINE = {"text": "red?", "answer": "no"}


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"answer": "no"}, {}, r'a.jsonl, line 1: has no "text" \(or "question"\)'),
        ({"text": "red?"}, {}, '"answers" must be a text or a list of texts, found None'),
        ({"text": "red?", "answers": ["no", 3]}, {}, '"answers" must be a text'),
        ({**FINE, "image": "../a.png"}, {}, "'../a.png' leaves data.image_folder"),
        ({**FINE, "image": "a.png"}, {}, r"line 1 \(id 0\): has a picture, and image_folder is not set"),
        ({**FINE, "image": "a.png"}, {"fields": {"image_folder": "nowhere"}}, "picture nowhere/a.png does not exist"),
        ({**FINE, "text": "<image> red?"}, {}, 'has 1 <image> in its text and 0 pictures in "image"'),
        (
            CHOICE,
            {"format": "vqa", "mode": "likelihood"},
            "--format vqa: has no candidates .*; multiple_choice and pope have",
        ),
        ({**CHOICE, "answer": "D"}, {"format": "multiple_choice"}, "'D', which is none of the 3 .* A to C"),
        ({**CHOICE, "answer": 3}, {"format": "multiple_choice"}, "3, which is none of the 3"),
        ({**CHOICE, "choices": ["B", "A"], "answer": "A"}, {"format": "multiple_choice"}, "'A', which is several of"),
        ({**CHOICE, "choices": ["a"]}, {"format": "multiple_choice"}, "has 1 options; give 2 to 26"),
        ({"text": "red?", "label": "maybe"}, {"format": "pope"}, '"label" is \'maybe\'; it must be "yes" or "no"'),
        ({"image": "a"}, {"format": "captions"}, '"captions" must be a text'),
        ({"captions": ["a dog"]}, {"format": "captions"}, 'has neither "image" nor "text"'),
        (["red?"], {}, "line 1: expected an object, found"),
        (FINE, {"format": "alpaca"}, "--format alpaca: is not about pictures; give one of vqa, multiple_choice"),
        (FINE, {"fields": {"chat_template": "plain"}}, 'under data.chat_template = "plain" a model sees no question'),
        (FINE, {"fields": {"chat_template": "v1"}}, 'data.chat_template = "v1"'),
        (FINE, {"fields": {"text_fields": ["a"]}}, "means nothing to this model, whose task is image_text_to_text"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    record: dict[str, Any], options: dict[str, Any], message: str, unloadable: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message):
        evaluate(unloadable, {"dev": tmp_path / "a.jsonl"}, progress=False, **options)


def test_an_unreadable_picture_is_named_with_its_question(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes((folder / "pictures" / "0.png").read_bytes()[:99])
    (tmp_path / "a.jsonl").write_text(json.dumps({**FINE, "image": "0.png", "id": "p0"}) + "\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 1 \(id 'p0'\): picture .*0.png cannot be read"):
        evaluate(folder / "base", {"a": tmp_path / "a.jsonl"}, fields={"image_folder": str(tmp_path)}, progress=False)


@pytest.mark.parametrize("options", [{"instruction": "Be brief."}, {"fields": {"image_folder": "."}}])
def test_what_is_for_pictures_is_refused_for_a_language_model(options: dict[str, Any], tmp_path: Path) -> None:
    base, file = toy.base_model(tmp_path / "base"), toy.write_records(tmp_path / "boolq.json", 2)
    with pytest.raises(UserError, match="means nothing to this model, whose task is causal_lm"):
        evaluate(base, {"boolq": file}, progress=False, **options)
