"""LLaVA's parts: loading any layout of names, which modules train, assembling from a tower and a language model."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.methods import LowRank, WeightDecomposed
from dora_dist.config import DataConfig
from dora_dist.models.build import build_model, skeleton
from dora_dist.models.families import adapter_plan, family_of_model, load_processor
from dora_dist.models.heads import IMAGE_TEXT_TO_TEXT
from dora_dist.models.llava.assemble import assemble_llava
from dora_dist.models.llava.placeholders import tokens_per_picture
from dora_dist.models.tokenizer import load_tokenizer
from dora_dist.runtime.errors import UserError
from dora_dist.training.rates import rated
from dora_dist.weights.placement import WholePlacement
from dora_dist.weights.safetensors_io import TensorFolder
from tests import llava

SPEC = WeightDecomposed(LowRank(4, 8.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    for kind in llava.TOWERS:
        llava.model(folder / kind, kind)
    return folder


def build(folder: Path, target_modules: list[str] | None = None, **options: Any) -> Any:
    plan = adapter_plan(SPEC, target_modules)
    return build_model(folder, plan, WholePlacement(), dtype="fp32", head=IMAGE_TEXT_TO_TEXT, **options)


def trainable(folder: Path, target_modules: list[str] | None = None) -> Any:
    run = build(folder, target_modules)
    family_of_model(run.model).prepare_for_training(run.model)
    return run


def plain(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def inputs(folder: Path) -> dict[str, Tensor]:
    """A batch with pictures as transformers' own processor makes it."""
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "right"
    images = [Image.new("RGB", (30, 60), (200, 10, 10)), Image.new("RGB", (50, 20), (0, 99, 0))]
    texts = ["is <image> even?", "and the other <image>, please?"]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("kind", llava.TOWERS)
def test_before_training_logits_are_those_of_transformers_bit_for_bit(folders: Path, kind: str) -> None:
    batch = inputs(folders / kind)
    with torch.no_grad():
        ours, theirs = build(folders / kind).model.eval()(**batch).logits, plain(folders / kind)(**batch).logits
    assert torch.equal(ours, theirs)
    assert (batch["input_ids"] == 300).sum() == 2 * 4


def with_names(folder: Path, target: Path, renamed: dict[str, str]) -> Path:
    """The folder with other names, by prefix; in one file."""
    target.mkdir()
    tensors = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            old = next((prefix for prefix in renamed if name.startswith(prefix)), None)
            tensors[renamed[old] + name.removeprefix(old) if old else name] = tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    for file in folder.glob("*.json"):
        if "index" not in file.name:
            (target / file.name).write_bytes(file.read_bytes())
    return target


PUBLISHED = {"vision_tower.": "vision_tower.vision_model."}
TODAYS = {
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


@pytest.mark.parametrize("names", [PUBLISHED, TODAYS], ids=["as published", "as modules are named today"])
def test_every_layout_of_names_loads(folders: Path, tmp_path: Path, names: dict[str, str]) -> None:
    other = with_names(folders / "clip", tmp_path / "other", names)
    theirs = dict(build(folders / "clip").model.named_parameters())
    for name, parameter in build(other).model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def test_only_the_language_model_is_adapted_unless_the_tower_is_named(folders: Path) -> None:
    run = build(folders / "clip")
    assert len(run.adapted) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in run.adapted)
    assert run.trained == ["model.multi_modal_projector"]
    assert {n.rpartition(".")[0] for n, p in run.model.named_parameters() if p.requires_grad and "lora" not in n} == {
        *run.adapted,
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    }
    assert len(build(folders / "clip", ["q_proj"]).adapted) == 2
    both = build(folders / "clip", ["q_proj", r".*vision_tower\..*\.q_proj"])
    assert len(both.adapted) == 2 + 3
    assert len(rated(both.model, "lora_B")) == 2 + 3  # a kind is one wherever the adapter is
    assert len(rated(both.model, "q_proj.lora_B")) == 2  # a pattern is not


def test_a_frozen_tower_stays_in_evaluation_mode(folders: Path) -> None:
    model = trainable(folders / "clip").model
    model.train()
    assert model.training and model.model.language_model.training
    assert not any(module.training for module in model.model.vision_tower.modules())
    trained = trainable(folders / "clip", [r".*vision_tower\..*\.q_proj"]).model
    trained.train()
    assert trained.model.vision_tower.training


def note_gradients(found: list[bool], tower: nn.Module, given: Any, output: Any) -> None:
    found.append(output[0].requires_grad)


@pytest.mark.parametrize("kind", llava.TOWERS)
def test_checkpointing_activations_brings_no_gradients_into_a_frozen_tower(folders: Path, kind: str) -> None:
    for target_modules, expected in ((None, False), ([r".*vision_tower\..*\.(q_proj|query)"], True)):
        model = trainable(folders / kind, target_modules).model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found: list[bool] = []
        model.model.vision_tower.register_forward_hook(partial(note_gradients, found))
        model(**inputs(folders / kind)).logits.sum().backward()
        assert found == [expected]
        assert all(p.grad.any() for p in model.model.multi_modal_projector.parameters())


def test_a_picture_that_no_token_refers_to_runs_the_projector_and_changes_nothing(folders: Path) -> None:
    run = trainable(folders / "clip")
    batch = inputs(folders / "clip")
    ids = torch.arange(3, 20)[None]
    with_picture = run.model(input_ids=ids, pixel_values=batch["pixel_values"][:1])
    assert torch.equal(with_picture.logits, run.model(input_ids=ids).logits)
    with_picture.logits.sum().backward()
    projector = run.model.model.multi_modal_projector
    assert all(p.grad is not None and not p.grad.any() for p in projector.parameters())
    with pytest.raises(RuntimeError, match="do not match"):
        run.model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match="do not match"):  # where nothing trains, it would be a picture that got lost
        build(folders / "clip").model(input_ids=ids, pixel_values=batch["pixel_values"][:1])


def test_tokens_of_a_picture_are_what_the_tower_makes_of_it(folders: Path) -> None:
    from transformers import AutoConfig, LlavaConfig

    assert tokens_per_picture(LlavaConfig(), 336, 336) == 576  # LLaVA-1.5
    assert tokens_per_picture(AutoConfig.from_pretrained(folders / "dinov2"), 42, 56) == 3 * 4
    with pytest.raises(UserError, match="330 x 330 pixels"):
        tokens_per_picture(LlavaConfig(), 330, 330)


def test_a_token_with_another_use_cannot_stand_for_pictures(folders: Path, tmp_path: Path) -> None:
    tower, language = folders / "clip-parts" / "tower", folders / "clip-parts" / "language"
    for token, use in (("<pad>", "pad_token"), ("</s>", "eos_token"), ("<s>", "bos_token")):
        with pytest.raises(UserError, match=f"--image-token '{token}': is the {use} of "):
            assemble_llava(tower, language, tmp_path / "out", image_token=token)
    data = DataConfig(train="-")
    assert load_processor(folders / "clip", data).stands.token == "<image>"
    text = load_tokenizer(folders / "clip")
    text.pad_token = "<image>"
    text.save_pretrained(tmp_path / "padded")
    with pytest.raises(UserError, match=r"model.tokenizer: its pad_token is '<image>', which stands for pictures in "):
        load_processor(folders / "clip", data, str(tmp_path / "padded"))


def test_another_family_with_pictures_is_refused(tmp_path: Path) -> None:
    from transformers import Idefics3Config

    Idefics3Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'idefics3' with pictures is not supported"):
        skeleton(tmp_path, IMAGE_TEXT_TO_TEXT)


# --- assembling ---------------------------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, Tensor]:
    opened = TensorFolder.open(folder)
    return {name: opened.read(name) for name in opened.entries}


def test_an_assembled_model_holds_its_parts_and_a_fresh_projector(folders: Path) -> None:
    parts = folders / "clip-parts"
    whole, tower, language = (tensors(f) for f in (folders / "clip", parts / "tower", parts / "language"))
    grown = {"model.embed_tokens.weight", "lm_head.weight"}
    for name, tensor in tower.items():
        assert torch.equal(whole.pop(f"vision_tower.{name}"), tensor)
    for name, tensor in language.items():
        found = whole.pop(f"language_model.{name}")
        assert torch.equal(found[: len(tensor)], tensor)
        assert len(found) == (320 if name in grown else len(tensor))
        if name in grown:
            torch.testing.assert_close(found[300:], tensor.mean(0).expand(20, -1))
    assert set(whole) == {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    weight = whole["multi_modal_projector.linear_1.weight"]
    assert 0.9 * 20**-0.5 < weight.abs().max() <= 20**-0.5
    config = json.loads((folders / "clip" / "config.json").read_text())
    assert (config["image_token_index"], config["image_seq_length"]) == (300, 4)
    assert config["vision_feature_select_strategy"] == "default"
    assert json.loads((folders / "siglip" / "config.json").read_text())["vision_feature_select_strategy"] == "full"


def test_transformers_loads_what_was_assembled_without_a_key_missing(folders: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    for kind in llava.TOWERS:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(folders / kind, output_loading_info=True)
        report = loaded[1]
        assert not report["missing_keys"] and not report["unexpected_keys"]
        processor: Any = AutoProcessor.from_pretrained(folders / kind)
        assert processor.chat_template and processor.image_processor.do_pad


def test_a_whole_clip_and_a_reserved_token_serve_as_well(folders: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(hidden_size=20, intermediate_size=26, num_hidden_layers=1, num_attention_heads=2)
    vision = CLIPVisionConfig(**llava.TOWER_SIZES)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        json.dumps(
            {"crop_size": 14, "size": {"shortest_edge": 20}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1] * 3}
        )
    )
    language = llava.language_model(tmp_path / "language", vocab_size=302)
    reserved = load_tokenizer(language)
    reserved.add_special_tokens({"extra_special_tokens": ["<unused0>", "<unused1>"]})
    reserved.save_pretrained(language)
    made = assemble_llava(tmp_path / "clip", language, tmp_path / "made", image_token="<unused1>", image_size=28)
    assert (made["image_token_id"], made["tokens_per_picture"]) == (301, 4)
    whole = tensors(tmp_path / "made")
    assert len(whole["language_model.model.embed_tokens.weight"]) == 302
    assert not any("text_model" in name or "projection" in name for name in whole)
    settings = json.loads((tmp_path / "made" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.1, 0.2, 0.3] and settings["crop_size"] == {"height": 28, "width": 28}
    for name, tensor in tensors(tmp_path / "clip").items():
        if name.startswith("vision_model."):
            assert torch.equal(whole[f"vision_tower.{name}"], tensor)
    assert plain(tmp_path / "made") is not None
    assemble_llava(tmp_path / "clip", language, tmp_path / "new", image_size=28)
    assert {"<image>", "<unused0>", "<unused1>"} <= set(load_tokenizer(tmp_path / "new").all_special_tokens)


def test_parts_that_do_not_fit_are_refused_and_leave_nothing(folders: Path, tmp_path: Path) -> None:
    tower, language = folders / "clip-parts" / "tower", folders / "clip-parts" / "language"
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--language .* is not a causal language model"):
        assemble_llava(tower, tower, out)
    with pytest.raises(UserError, match="--vision .* is not a vision tower"):
        assemble_llava(language, language, out)
    with pytest.raises(UserError, match=r"--vision .*: pictures are made 42 x 42 pixels.* set --image-size 28"):
        assemble_llava(tower, language, out, image_size=42)
    with pytest.raises(UserError, match="is not one token"):
        assemble_llava(tower, language, out, image_token="")
    small = with_names(tower, tmp_path / "small", {"encoder.layers.2.": "gone."})
    with pytest.raises(UserError, match=r"no weights for .*layers\.2\."):
        assemble_llava(small, language, out)
    assert not out.exists()
    llava.language_model(tmp_path / "tied", tie_word_embeddings=True)
    assemble_llava(tower, tmp_path / "tied", out)
    model = plain(out)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
