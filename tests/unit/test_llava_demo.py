"""The LLaVA demo's own parts: a tower out of an ONNX file, pictures out of a package, what is held out."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import emoji_pictures
import llava_demo
import numpy as np
import onnx
import onnx_tower
import pytest
import stages
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from dora_dist.config import RunConfig
from dora_dist.data.conversations import read_conversation
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.questions import read_questions

KINDS = ("Animals & Nature", "Food & Drink", "Flags")


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Any, Path]:
    """A small tower with an attention head of the usual size, and an ONNX file that stores it as an export does."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 42}
    model: Any = Dinov2Model(Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "published")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "published" / "model.safetensors")
    del tensors["embeddings.mask_token"]
    table = tensors.pop("embeddings.position_embeddings")
    constants = {"a1": table[:, :1], "a2": table[:, 1:], "decoder.weight": torch.ones(1, 3)}
    nodes: list[Any] = []
    for name, value in tensors.items():
        bias = f"{name.removesuffix('weight')}bias"
        if value.ndim == 2 and bias in tensors:
            number = len(nodes)
            constants[f"m{number}"] = value.T
            nodes.append(helper.make_node("MatMul", [f"x{number}", f"m{number}"], [f"y{number}"]))
            nodes.append(helper.make_node("Add", [f"backbone.{bias}", f"y{number}"], [f"z{number}"]))
        else:
            constants[f"backbone.{name}"] = value
    initializers = [numpy_helper.from_array(np.ascontiguousarray(v.numpy()), name) for name, v in constants.items()]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "tower", inputs, [], initializers)
    onnx.save(helper.make_model(graph), tmp_path / "tower.onnx")
    return model, tmp_path / "tower.onnx"


def test_the_tower_in_an_onnx_file_is_the_one_that_was_exported(exported: tuple[Any, Path], tmp_path: Path) -> None:
    model, file = exported
    onnx_tower.import_dinov2(file, tmp_path / "tower")
    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        found = Dinov2Model.from_pretrained(tmp_path / "tower").eval()(pixels).last_hidden_state
    assert torch.equal(found, expected)


def test_an_onnx_file_without_a_layer_is_refused(exported: tuple[Any, Path], tmp_path: Path) -> None:
    graph = onnx.load(exported[1])
    kept = [t for t in graph.graph.initializer if t.name != "backbone.encoder.layer.0.norm1.weight"]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    onnx.save(graph, exported[1])
    with pytest.raises(UserError, match="no whole DINOv2"):
        onnx_tower.import_dinov2(exported[1], tmp_path / "tower")
    assert not (tmp_path / "tower").exists()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An archive laid out like the real one: 60 subjects, of which some have a twin, one picture twice, and a part."""
    listed: list[dict[str, Any]] = []
    for i in range(60):
        listed.append({"name": f"THING {i}", "image": f"{i}.png", "category": KINDS[i % 3]})
        if i % 5 == 0:
            listed.append({"name": f"WOMAN THING {i}", "image": f"w{i}.png", "category": KINDS[i % 3]})
    listed.append({"name": "THING 7 AGAIN", "image": "again.png", "category": KINDS[0]})
    listed.append({"name": "A PART", "image": "part.png", "category": "Component"})
    path = tmp_path / "emoji.tgz"
    more = {"has_img_google": True, "subcategory": "thing"}
    with tarfile.open(path, "w:gz") as archive:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        add("package/emoji.json", json.dumps([{**entry, **more} for entry in listed]).encode())
        for number, entry in enumerate(listed):
            picture = io.BytesIO()
            colour = (7, 9, 9, 255) if entry["image"] in ("7.png", "again.png") else (number, 80, 90, 255)
            image = Image.new("RGBA", (8, 8))
            image.paste(colour, (2, 2, 6, 6))
            image.save(picture, "PNG")
            add(f"package/img/google/64/{entry['image']}", picture.getvalue())
        add("package/img/google/64/../../../../escaped.png", b"")
    return path


@pytest.fixture
def data(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(llava_demo, "DATA", tmp_path / "data")
    monkeypatch.setattr(llava_demo, "PICTURES", tmp_path / "data" / "pictures")
    monkeypatch.setattr(llava_demo, "HELD_OUT", 20)
    llava_demo.build_data(package)
    return tmp_path / "data"


def test_pictures_are_on_white_each_once_and_below_their_folder(package: Path, tmp_path: Path) -> None:
    found = emoji_pictures.extract(package, tmp_path / "pictures")
    names = {one.name for one in found}
    assert len(found) == len(names) == 72
    assert "a part" not in names
    assert len({"thing 7", "thing 7 again"} & names) == 1
    with Image.open(tmp_path / "pictures" / "7.png") as image:
        assert (image.mode, image.getpixel((0, 0)), image.getpixel((3, 3))) == ("RGB", (255, 255, 255), (7, 9, 9))
    assert not list(tmp_path.rglob("escaped.png"))


def test_no_subject_is_on_both_sides(data: Path) -> None:
    training = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    held_out = read_questions(str(data / "kinds.jsonl"), "vqa", instruction="")
    subjects = {name.removeprefix("woman ") for name in (record["id"] for record in training)}
    assert 20 <= len(held_out) < 23
    assert len(training) + len(held_out) == 72
    assert subjects.isdisjoint(str(question.id).removeprefix("woman ") for question in held_out)
    assert [q.id for q in read_questions(str(data / "names.jsonl"), "captions")] == [q.id for q in held_out]


def test_each_picture_is_asked_about_twice_in_either_order(data: Path) -> None:
    records = [json.loads(line) for line in (data / "conversations.jsonl").read_text().splitlines()]
    first = set()
    for record in records:
        (_, question), (_, answer), (_, other), _ = read_conversation(record).turns
        first.add(question.removeprefix("<image>\n"))
        assert {question.removeprefix("<image>\n"), other} == {emoji_pictures.KIND, emoji_pictures.NAME}
        assert answer == (record["id"] if emoji_pictures.NAME in question else KINDS[int(record["id"].split()[-1]) % 3])
    assert first == {emoji_pictures.KIND, emoji_pictures.NAME}


def test_the_shipped_configs_name_the_demos_folders() -> None:
    before, after = (RunConfig.load(stages.ROOT / name) for name in llava_demo.CONFIGS)
    assert [Path(config.model.path) for config in (before, after)] == [llava_demo.BASE, llava_demo.PRETRAINED]
    assert Path(before.checkpoint.run_dir) == llava_demo.PRETRAIN
    assert Path(after.checkpoint.run_dir) == llava_demo.TRAINED
    assert {Path(config.data.image_folder or "") for config in (before, after)} == {llava_demo.PICTURES}
    assert after.adapter.weight_decomposed
    assert before.adapter.target_modules == []


def test_the_contact_sheet_shows_every_picture(data: Path, tmp_path: Path) -> None:
    truth = [json.loads(line) for line in (data / "kinds.jsonl").read_text().splitlines()]
    said = {task: {record["question_id"]: "Flags" for record in truth} for task in ("kinds", "names")}
    llava_demo.draw_sheet(truth, said, said, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 500
