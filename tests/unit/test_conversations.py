"""LLaVA's conversations: text and labels, pictures, truncation, order, and everything a record can get wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dora_dist.config import DataConfig
from dora_dist.data import FILLER, IGNORED, ConversationReader, EpochBatches, PictureCollator, read
from dora_dist.data.conversations import VICUNA_SYSTEM, read_conversation, render, with_conversations
from dora_dist.data.pictures import PictureReader, missing_pictures
from dora_dist.models.families import load_processor
from dora_dist.runtime.errors import UserError
from dora_dist.training.agreement import of_data
from tests import llava

IMAGE, COUNT = 300, 4  # the toy's image token, and how many a picture is


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    llava.model(folder / "base")
    llava.write(folder, 8, 6)
    return folder


def data(folder: Path, **changes: Any) -> DataConfig:
    fields = {
        "train": str(folder / "data.json"),
        "format": "llava",
        "image_folder": str(folder / "pictures"),
        "loss_on": "answer",
        "cutoff_len": 400,
        "cache": None,
    }
    return DataConfig(**{**fields, **changes})


def built(folder: Path, **changes: Any) -> Any:
    config = data(folder, **changes)
    return read_with(load_processor(folder / "base", config), config)


def read_with(processor: Any, config: DataConfig) -> Any:
    return read(ConversationReader(config, processor), config, seed=0, progress=False)


def tokenizer(folder: Path) -> Any:
    return load_processor(folder / "base", data(folder)).tokenizer


def record(*turns: tuple[str, str], image: Any = None) -> dict[str, Any]:
    return {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        **({"image": image} if image else {}),
    }


TWO_TURNS = record(("human", "<image>\nis it?"), ("gpt", "no"), ("human", "sure?"), ("gpt", "yes"), image="a.png")


def test_vicuna_v1_is_llavas_prompt_and_its_template_says_the_same(folder: Path) -> None:
    text = tokenizer(folder)
    rendered = render(read_conversation(TWO_TURNS), "vicuna_v1", text, "<image>", True)
    expected = f"{VICUNA_SYSTEM} USER: <image>\nis it? ASSISTANT: no</s>USER: sure? ASSISTANT: yes</s>"
    assert rendered.text == expected  # the toy's tokenizer puts no <s> in front by itself
    assert [rendered.text[start:stop] for start, stop in rendered.answers] == [" no</s>", " yes</s>"]
    own = render(read_conversation(TWO_TURNS), "model", text, "<image>", True)
    assert own.text == f"<s>{expected}"
    assert [own.text[start:stop] for start, stop in own.answers] == [" no</s>", " yes</s>"]


def test_templates_that_want_typed_parts_get_them(folder: Path) -> None:
    text = tokenizer(folder)
    text.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}[{{ part['text'] }}]{% endif %}{% endfor %};{% endfor %}"
    )
    conversation = read_conversation(record(("human", "one <image> two\n<image>"), ("gpt", "3"), image=["a", "b"]))
    rendered = render(conversation, "model", text, "<image>", True)
    assert rendered.text == "user:[one]<image>[two]<image>;assistant:[3];"
    text.chat_template = (  # ChatML, which adds strings; and another template than just before
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rendered = render(conversation, "model", text, "<image>", True)
    assert rendered.text == (
        "<|im_start|>user\none <image> two\n<image><|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    assert [rendered.text[start:stop] for start, stop in rendered.answers] == ["3<|im_end|>\n"]
    text.chat_template = None
    with pytest.raises(UserError, match=r'data.chat_template = "model": the tokenizer has no chat template; use "vic'):
        render(conversation, "model", text, "<image>", True)


def test_plain_is_pictures_and_caption(folder: Path) -> None:
    conversation = read_conversation(record(("human", "describe <image>"), ("gpt", "a cat"), image="a.png"))
    rendered = render(conversation, "plain", tokenizer(folder), "<image>", True)
    assert rendered.text == "<image>a cat\n"
    assert [rendered.text[start:stop] for start, stop in rendered.answers] == ["a cat\n"]
    with pytest.raises(UserError, match="one question and one answer"):
        render(read_conversation(TWO_TURNS), "plain", tokenizer(folder), "<image>", True)


def test_tokens_are_those_of_transformers_processor_and_labels_the_answers(folder: Path) -> None:
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder / "base")
    train = built(folder).train
    records = json.loads((folder / "data.json").read_text())
    assert len(train) == len(records) == 15
    for sample, row in zip(train, records, strict=False):
        conversation = read_conversation(row)
        text = render(conversation, "vicuna_v1", processor.tokenizer, "<image>", True).text
        images = [Image.open(folder / "pictures" / path).convert("RGB") for path in conversation.pictures]
        theirs = processor(text=text, images=images or None, return_tensors="pt")
        assert sample["input_ids"] == theirs["input_ids"][0].tolist()
        if images:
            torch.testing.assert_close(torch.stack(sample["pictures"]), theirs["pixel_values"], atol=0.02, rtol=0)
        learnt = [t for t, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != IGNORED]
        answers = "".join(f" {text}</s>" for role, text in conversation.turns if role == "assistant")
        assert processor.tokenizer.decode(learnt) == answers
        assert all(label in (IGNORED, t) for t, label in zip(sample["input_ids"], sample["labels"], strict=True))


def test_truncation_never_parts_a_picture_from_its_tokens(folder: Path, tmp_path: Path) -> None:
    names = llava.pictures(folder / "pictures")
    turns = [("human", "<image> red?"), ("gpt", "no"), ("human", "<image><image>"), ("gpt", "yes <image>")]
    (tmp_path / "data.json").write_text(json.dumps([record(*turns, image=names[:4])]))
    [whole] = built(folder, train=str(tmp_path / "data.json")).train
    first = next(i for i, label in enumerate(whole["labels"]) if label != IGNORED)
    counts = set()
    for cutoff_len in range(first + 1, len(whole["input_ids"]) + 1):
        cut = built(folder, train=str(tmp_path / "data.json"), cutoff_len=cutoff_len)
        [sample] = cut.train
        ids, following = sample["input_ids"], whole["input_ids"][len(sample["input_ids"]) :]
        assert whole["input_ids"] == ids + following and sample["labels"] == whole["labels"][: len(ids)]
        assert ids.count(IMAGE) == COUNT * len(sample["pictures"])
        # Cut only where it must be: at the bound, or before a picture that would cross it.
        crossing = following[:1] == [IMAGE] and len(ids) < cutoff_len < len(ids) + COUNT
        assert len(ids) == cutoff_len or crossing
        assert cut.train_stats.truncated == bool(following)
        counts.add(len(sample["pictures"]))
    assert counts == {1, 2, 3, 4}


def test_a_cutoff_that_leaves_room_for_no_picture_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    config = data(folder)
    processor = load_processor(folder / "base", config)
    large = replace(processor, stands=replace(processor.stands, count=400))
    with pytest.raises(
        UserError, match=r"record 1 \(id 'p0'\): a picture is 400 tokens, .*data.cutoff_len = 400 leaves"
    ):
        read_with(large, config)
    with pytest.raises(UserError, match="data.train: a picture is 4 tokens, and data.cutoff_len = 20 leaves no room"):
        built(folder, cutoff_len=20)  # the prompt before every picture is longer
    texts = [row for row in json.loads((folder / "data.json").read_text()) if "image" not in row]
    (tmp_path / "data.json").write_text(json.dumps(texts))
    only_texts = data(folder, train=str(tmp_path / "data.json"))
    assert len(read_with(large, only_texts).train) == 6


def test_stats_count_tokens_of_pictures(folder: Path) -> None:
    found = built(folder)
    samples = list(found.train)
    assert found.train_stats.tokens == sum(len(sample["input_ids"]) for sample in samples)
    assert (found.train_stats.samples, found.train_stats.pictures, found.train_stats.text_only) == (15, 10, 6)
    assert found.train.lengths.tolist() == [len(sample["input_ids"]) for sample in samples]
    assert "6 without pictures" in str(found.train_stats)


def test_held_out_records_are_no_training_records(folder: Path) -> None:
    found = built(folder, validation_samples=5)
    places = [
        {part.reader.place_of(part.table, int(row)) for row in part.index} for part in (found.train, found.validation)
    ]
    assert len(places[0]) == 10 and len(places[1]) == 5 and not places[0] & places[1]


def test_ranks_are_told_apart_by_the_names_of_pictures_alone_but_not_by_their_files(
    folder: Path, tmp_path: Path
) -> None:
    names = llava.pictures(folder / "pictures")
    records = json.loads((folder / "data.json").read_text())
    for name, image in (("same", names[0]), ("other", names[5])):
        records[0]["image"] = image
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    mine, same, other = (
        of_data(built(folder, train=str(file), validation_samples=2))
        for file in (folder / "data.json", tmp_path / "same.json", tmp_path / "other.json")
    )
    assert mine == same and mine.keys() == {"training data", "validation data"}
    assert mine["training data"] != other["training data"]


# --- pictures -----------------------------------------------------------------------------------------------------


def reader(folder: Path, **changes: Any) -> PictureReader:
    config = data(folder, **changes)
    return load_processor(folder / "base", config).reader


SIZES: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}


def clip_processor() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(**SIZES)


def test_padding_is_llavas(tmp_path: Path) -> None:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    pixels = torch.randint(0, 256, (40, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy())
    image.save(tmp_path / "a.png")
    ours = PictureReader(tmp_path, clip_processor(), pad=True, max_pixels=10_000)
    theirs = LlavaImageProcessorPil(do_pad=True, **SIZES)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours("a.png"), theirs)
    cropped = PictureReader(tmp_path, clip_processor(), pad=False, max_pixels=10_000)
    assert not torch.allclose(cropped("a.png"), theirs)


def test_a_picture_is_refused_before_it_is_decoded_if_it_is_too_large(folder: Path, tmp_path: Path) -> None:
    Image.new("1", (8_000, 8_000)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="8000 x 8000 pixels, more than data.max_image_pixels = 50,000,000"):
        reader(folder, image_folder=str(tmp_path))("large.png")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")  # 100 kB that would be 2.7 GB
    with pytest.raises(UserError, match=r"bomb.png has more pixels than data.max_image_pixels = 50,000,000"):
        reader(folder, image_folder=str(tmp_path))("bomb.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "small.png")
    small = reader(folder, image_folder=str(tmp_path), max_image_pixels=1599)
    with pytest.raises(UserError, match="40 x 40 pixels, more than data.max_image_pixels = 1,599"):
        small("small.png")


def test_what_padding_or_resizing_makes_of_a_strip_is_bounded_too(folder: Path, tmp_path: Path) -> None:
    Image.new("1", (6_000, 40)).save(tmp_path / "strip.png")  # a kilobyte; its square is 108 MB
    Image.new("RGB", (1_000, 40)).save(tmp_path / "wide.png")
    options = {"image_folder": str(tmp_path), "max_image_pixels": 1_000_000}
    padded = reader(folder, **options)
    with pytest.raises(UserError, match=r"6000 x 40 pixels, padded to 6000 x 6000, more than data.max_image_pixels"):
        padded("strip.png")
    assert padded("wide.png").shape == (3, 28, 28)
    # The assembled processor pads by itself, whoever else does not; a CLIP's own resizes by the shorter side.
    with pytest.raises(UserError, match="padded to 6000 x 6000"):
        reader(folder, **options, image_aspect_ratio="processor")("strip.png")
    cropping = PictureReader(tmp_path, clip_processor(), pad=False, max_pixels=1_000_000)
    with pytest.raises(UserError, match=r"6000 x 40 pixels: one side is more than 100 times the other"):
        cropping("strip.png")
    assert cropping("wide.png").shape == (3, 28, 28)


def test_what_is_no_whole_picture_is_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "pictures" / "a" / "1-green.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "postscript.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    read = reader(folder, image_folder=str(tmp_path))
    for name in ("cut.png", "text.png", "postscript.png"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            read(name)
    with pytest.raises(UserError, match="does not exist"):
        read("absent.png")


def test_missing_pictures_are_found_by_one_listing_a_folder(folder: Path) -> None:
    names = llava.pictures(folder / "pictures")
    assert missing_pictures(folder / "pictures", [*names, "a/z.png", "b/c/d.png"]) == {"a/z.png", "b/c/d.png"}


def test_missing_pictures_are_an_error_or_leave_their_records_out(folder: Path, tmp_path: Path) -> None:
    records = json.loads((folder / "data.json").read_text())
    records[2]["image"] = "a/gone.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"record 3 \(id 'p2'\): picture .*gone.png does not exist \(1 pictures"):
        built(folder, train=str(tmp_path / "data.json"))
    found = built(folder, train=str(tmp_path / "data.json"), bad_images="skip")
    assert (found.train_stats.samples, found.train_stats.without_picture) == (14, 1)


def test_a_batch_without_pictures_has_a_black_one_that_nothing_refers_to(folder: Path) -> None:
    train = built(folder).train
    collator = PictureCollator(0, (28, 28), 8)
    batch = collator([train[i] for i in range(9, 12)])
    assert not batch["pixel_values"].any() and batch["pixel_values"].shape == (1, 3, 28, 28)
    assert not (batch["input_ids"] == IMAGE).any()
    batch = collator([train[8], train[9], train[0]])
    assert torch.equal(batch["pixel_values"], torch.stack([*train[8]["pictures"], *train[0]["pictures"]]))
    assert (batch["input_ids"] == IMAGE).sum(1).tolist() == [8, 0, 4]


def test_a_picture_that_cannot_be_read_leaves_padding_and_says_where_it_was_named(folder: Path) -> None:
    config = data(folder, image_folder=str(folder / "nowhere"), bad_images="skip", train=str(folder / "data.json"))
    processor = load_processor(folder / "base", data(folder))
    processor.tokenizer.pad_token = "<s>"
    train = read_with(processor, data(folder)).train
    train.reader.pictures = load_processor(folder / "base", config).reader
    sample = train[8]
    assert (
        (sample["input_ids"], sample["labels"]) == ([processor.tokenizer.pad_token_id], [IGNORED]) != ([0], [IGNORED])
    )
    assert sample["problem"].startswith(f"{folder / 'data.json'}, record 9 (id 'two'): picture ")


# --- order --------------------------------------------------------------------------------------------------------


def test_batches_are_alike_in_modality_and_sorted_by_length(folder: Path) -> None:
    train = built(folder).train
    order = train.epoch_order(7, 2)
    assert sorted(order) == list(range(15))
    batches = [order[i : i + 2] for i in range(0, 15, 2)]
    pictured = train.table["pictures"].diff()[train.index] > 0
    kinds = [{bool(pictured[i]) for i in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds[:-1])
    for first, second in batches[:-1]:
        assert train.lengths[first] >= train.lengths[second]
    assert train.epoch_order(7, 2) == order and train.epoch_order(8, 2) != order
    assert built(folder, group_by_modality_length=False).train.epoch_order is None


def test_what_the_order_follows_from_is_told_to_a_resume(folder: Path, tmp_path: Path) -> None:
    records = json.loads((folder / "data.json").read_text())
    (tmp_path / "same.json").write_text(json.dumps([*records[:-1], {**records[-1], "id": "renamed"}]))
    records[-1]["conversations"][1]["value"] += " indeed"
    (tmp_path / "longer.json").write_text(json.dumps(records))
    facts = built(folder).train.order_facts
    assert built(folder, train=str(tmp_path / "same.json")).train.order_facts == facts
    changed = built(folder, train=str(tmp_path / "longer.json")).train.order_facts
    assert {name for name in facts if changed[name] != facts[name]} == {"lengths of the training samples"}
    alone = {"data.group_by_modality_length": False}
    assert built(folder, group_by_modality_length=False).train.order_facts == alone


def test_a_grouped_order_is_cut_alike_for_every_world_size(folder: Path) -> None:
    train = built(folder).train
    for world_size, micro in ((1, 6), (2, 3), (3, 1), (3, 2)):
        ranks = [
            list(
                EpochBatches(
                    len(train),
                    global_batch_size=6,
                    micro_batch_size=micro,
                    world_size=world_size,
                    rank=rank,
                    seed=3,
                    order=train.epoch_order,
                )
            )
            for rank in range(world_size)
        ]
        assert all(len(batches) == 3 * 6 // (micro * world_size) for batches in ranks)
        steps = [[b for rank in ranks for b in rank[i::1][:1]] for i in range(len(ranks[0]))]
        flat = [i for step in steps for batch in step for i in batch]
        expected = train.epoch_order(3 * 1_000_003, 6)
        assert [i for i in flat if i != FILLER] == expected


# --- what a record can get wrong ----------------------------------------------------------------------------------

BAD = {
    "unknown speaker": (record(("user", "hi"), ("gpt", "ho")), "turn 1 is from 'user'; known speakers are human, gpt"),
    "no answer": (record(("human", "hi")), "no question with an answer"),
    "twice": (record(("human", "a"), ("human", "b"), ("gpt", "c")), "two turns of the user in a row"),
    "mark without a picture": (record(("human", "<image> a"), ("gpt", "b")), "1 <image> in its text and 0 pictures"),
    "picture without a mark": (record(("human", "a"), ("gpt", "b"), image="x"), "0 <image> in its text and 1 pictures"),
    "leaves": (record(("human", "<image>"), ("gpt", "b"), image="../x.png"), "leaves data.image_folder"),
    "leaves inside": (record(("human", "<image>"), ("gpt", "b"), image="a/../../x"), "leaves data.image_folder"),
    "absolute": (record(("human", "<image>"), ("gpt", "b"), image="/etc/x.png"), "leaves data.image_folder"),
    "number": (record(("human", "<image>"), ("gpt", "b"), image=7), '"image" must be the path'),
    "no text": ({"conversations": [{"from": "human"}]}, 'strings "from" and "value"'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_refused_by_place_and_id(folder: Path, tmp_path: Path, case: str) -> None:
    bad, message = BAD[case]
    (tmp_path / "data.json").write_text(json.dumps([record(("human", "a"), ("gpt", "b")), {**bad, "id": "x7"}]))
    with pytest.raises(UserError) as caught:
        built(folder, train=str(tmp_path / "data.json"))
    assert message in str(caught.value) and "record 2 (id 'x7')" in str(caught.value)


def test_messages_with_parts_are_the_same_conversation(folder: Path, tmp_path: Path) -> None:
    question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "\nis it?"}]
    turns = [("user", question), ("assistant", "no"), ("user", "sure?"), ("assistant", "yes")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert read_conversation(with_conversations({"messages": messages})) == read_conversation(TWO_TURNS)
    question[0].pop("image")
    assert read_conversation(with_conversations({"messages": messages, "images": ["a.png"]})).pictures == ("a.png",)
    question[0]["image"] = "https://there/a.png"
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages}]))
    with pytest.raises(UserError, match=r"record 1: a picture of its content is not a path below data.image_folder"):
        built(folder, train=str(tmp_path / "data.json"))


def test_turns_before_the_first_question_and_after_the_last_answer_are_left_out() -> None:
    turns = record(("gpt", "hello"), ("human", "a"), ("gpt", "b"), ("human", "c"))
    assert read_conversation(turns).turns == (("user", "a"), ("assistant", "b"))


def test_a_text_that_holds_the_models_own_image_token_is_refused(folder: Path) -> None:
    conversation = read_conversation(record(("human", "a <pad> b"), ("gpt", "c")))
    with pytest.raises(UserError, match="its text holds '<pad>'"):
        render(conversation, "vicuna_v1", tokenizer(folder), "<pad>", True)
