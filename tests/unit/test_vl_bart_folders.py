"""VL-BART from folders of BART and of VL-BART, its adapters in PEFT's format, merged folders, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, BartForConditionalGeneration

from dora_dist.adapters.folders import read_adapter
from dora_dist.adapters.layer import adapted_layers
from dora_dist.adapters.methods import LowRank, WeightDecomposed
from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.evaluation.inference import head_at, load_for_inference
from dora_dist.models.build import AdaptedModel, build_model
from dora_dist.models.families import adapter_plan
from dora_dist.models.heads import SEQ2SEQ_LM, VISION_SEQ2SEQ_LM, head_of_model
from dora_dist.runtime.errors import UserError
from dora_dist.weights.placement import WholePlacement
from tests import encoders, summaries, vl_bart

HEAD = VISION_SEQ2SEQ_LM.with_features(vl_bart.FEATURE_DIM)
OWN = "model.encoder.visual_embedding"
METHOD = WeightDecomposed(LowRank(4, 8.0))


def build(base: Path, **options: Any) -> AdaptedModel:
    options = {"plan": adapter_plan(METHOD), "head": HEAD, "dtype": "fp32", **options}
    return build_model(base, options.pop("plan"), WholePlacement(), **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**vl_bart.batch(), decoder_input_ids=torch.tensor([[2, 5, 9, 11]]).repeat(3, 1)).logits


def randomised(run: AdaptedModel) -> AdaptedModel:
    """With values for all that trains, as if it were trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    run.norms.refresh()
    return run


def save_adapter(run: AdaptedModel, folder: Path) -> None:
    """The folder that a run's checkpoint would hold."""
    layers: dict[str, Any] = {}
    for name, layer in adapted_layers(run.model).items():
        layers[name] = layer.method.to_peft(layer.shape, layer.adapter_parameters(), layer.base_norm)
    adapter = PeftAdapter(
        base_model=str(run.base),
        lora_alpha=8.0,
        r=4,
        dropout=0.0,
        use_dora=True,
        layers=layers,
        trained={n: p.detach() for n, p in run.model.named_parameters() if n.startswith(OWN)},
    )
    adapter.task_type, adapter.modules_to_save = run.head.peft_type, run.trained
    adapter.model_config = run.head.kept_config(run.model)
    write_peft_folder(folder, adapter)


@pytest.mark.parametrize("kind", ["BartForConditionalGeneration", "BartModel"])
def test_a_bart_becomes_a_vl_bart_whose_visual_embedding_is_new(kind: str, tmp_path: Path) -> None:
    base = summaries.base_model(tmp_path / "base", kind=kind)
    run = build(base, seed=3)
    expected = vl_bart.model(vocab_size=run.model.config.vocab_size)
    bart: Any = BartForConditionalGeneration.from_pretrained(base)
    new = {name: run.model.get_parameter(name) for name in run.fresh}
    assert not expected.load_state_dict({**bart.state_dict(), **new}, strict=False).missing_keys
    assert torch.equal(logits(run.model), logits(expected))
    assert (run.trained, set(run.fresh)) == ([OWN], {n for n, _ in run.model.named_parameters() if n.startswith(OWN)})
    attentions = [f"encoder.layers.{i}.self_attn" for i in (0, 1)]
    attentions += [f"decoder.layers.{i}.{kind}_attn" for i in (0, 1) for kind in ("self", "encoder")]
    assert set(run.adapted) == {f"model.{name}.{part}_proj" for name in attentions for part in "qv"}
    model = run.model
    tables = [model.lm_head, model.model.shared, model.model.encoder.embed_tokens, model.model.decoder.embed_tokens]
    assert len({id(module.weight) for module in tables}) == 1 and not model.lm_head.weight.requires_grad


def test_its_new_values_follow_from_the_seed(tmp_path: Path) -> None:
    head = VISION_SEQ2SEQ_LM.with_features(300)
    base = summaries.base_model(tmp_path / "base")
    one, same, other = (build(base, head=head, seed=seed).model.get_submodule(OWN) for seed in (1, 1, 2))
    assert torch.equal(one.features.weight, same.features.weight)
    assert not torch.equal(one.features.weight, other.features.weight)
    assert one.features.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for linear, norm in ((one.features, one.features_norm), (one.boxes, one.boxes_norm)):
        assert not linear.bias.any() and not norm.bias.any() and bool((norm.weight == 1).all())


def test_a_vl_bart_is_read_whole(tmp_path: Path) -> None:
    base = vl_bart.base_model(tmp_path / "base")
    for head in (HEAD, VISION_SEQ2SEQ_LM):
        run = build(base, head=head)
        assert (run.trained, run.fresh) == ([OWN], [])
        assert torch.equal(logits(run.model), logits(AutoModelForSeq2SeqLM.from_pretrained(base)))
    assert head_of_model(json.loads((base / "config.json").read_text())) == VISION_SEQ2SEQ_LM


def test_bases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = vl_bart.base_model(tmp_path / "base")
    with pytest.raises(UserError, match=r"feature_dim = 8: .*base reads features of width 7; set it to null"):
        build(base, head=VISION_SEQ2SEQ_LM.with_features(8))
    with pytest.raises(UserError, match=r'task = "seq2seq_lm": .*base reads visual .* set it to "vision_seq2seq_lm"'):
        build(base, head=SEQ2SEQ_LM)
    with pytest.raises(UserError, match="'bert' does not read visual features; give a BART or a VL-BART"):
        build(encoders.plain_encoder(tmp_path / "bert", "bert"))
    tensors = load_file(base / "model.safetensors")
    tensors[f"{OWN}.boxes.weight"] = torch.ones(36, 4)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"boxes.weight' .* has shape \[36, 4\], the model needs \[36, 5\]"):
        build(base)


@pytest.mark.parametrize("kind", ["BartForConditionalGeneration", "BartModel", "VLBart"])
def test_an_adapter_is_evaluated_merged_and_read_by_peft(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    theirs = kind == "VLBart"
    base = vl_bart.base_model(tmp_path / "base") if theirs else summaries.base_model(tmp_path / "base", kind=kind)
    run = randomised(build(base))
    expected = logits(run.model)
    save_adapter(run, tmp_path / "adapter")
    assert head_at(str(tmp_path / "adapter")) == HEAD
    unmerged, _ = load_for_inference(str(tmp_path / "adapter"), "fp32")
    assert torch.allclose(logits(unmerged), expected, atol=1e-5, rtol=0)
    consolidate(tmp_path / "adapter", base, tmp_path / "merged", progress=False)
    assert head_at(str(tmp_path / "merged")) == VISION_SEQ2SEQ_LM
    merged: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-4, rtol=0)
    assert torch.equal(logits(load_for_inference(str(tmp_path / "merged"), "fp32")[0]), logits(merged))
    again = VISION_SEQ2SEQ_LM if theirs else HEAD
    plain = build(base, head=again, plan=lambda model: {}, trained_modules=[OWN]).model
    peft = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    assert torch.allclose(logits(peft), expected, atol=1e-4, rtol=0)


def test_an_adapter_without_our_configuration_says_its_width_by_its_visual_embedding(tmp_path: Path) -> None:
    base = summaries.base_model(tmp_path / "base")
    run = randomised(build(base))
    save_adapter(run, tmp_path / "adapter")
    (tmp_path / "adapter" / "model_config.json").unlink()
    assert head_at(str(tmp_path / "adapter")) == HEAD
    unmerged, _ = load_for_inference(str(tmp_path / "adapter"), "fp32")
    assert torch.allclose(logits(unmerged), logits(run.model), atol=1e-5, rtol=0)
    start = read_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"has shape \[36, 7\] in .* and \[36, 9\] here; set model.feature_dim to the"):
        build(base, head=VISION_SEQ2SEQ_LM.with_features(9), start_from=start)


def test_pefts_own_adapter_comes_in_and_is_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = vl_bart.base_model(tmp_path / "base")
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(base)
    settings = {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(model, LoraConfig(**settings, modules_to_save=["visual_embedding"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(tmp_path / "peft"))
    assert head_at(str(tmp_path / "peft")) == HEAD
    unmerged, _ = load_for_inference(str(tmp_path / "peft"), "fp32")
    assert torch.allclose(logits(unmerged), logits(model), atol=1e-4, rtol=0)
    consolidate(tmp_path / "peft", base, tmp_path / "merged", progress=False)
    merged, _ = load_for_inference(str(tmp_path / "merged"), "fp32")
    assert torch.allclose(logits(merged), logits(model), atol=1e-4, rtol=0)
    written = model.generate(**vl_bart.batch(), num_beams=5, max_new_tokens=6)
    assert torch.equal(unmerged.generate(**vl_bart.batch(), num_beams=5, max_new_tokens=6), written)
