"""Encoders: folders of every kind load, heads are read or made new, PEFT's modules_to_save go in and out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from dora_dist.adapters.inject import by_pattern, inject
from dora_dist.adapters.methods import LowRank, WeightDecomposed
from dora_dist.adapters.patterns import trained_in_full
from dora_dist.adapters.peft_format import PeftAdapter, read_peft_folder, write_peft_folder
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.evaluation.inference import head_at, load_for_inference
from dora_dist.models.build import AdaptedModel, build_model
from dora_dist.models.families import adapter_plan
from dora_dist.models.heads import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from dora_dist.runtime.errors import UserError
from dora_dist.weights.placement import WholePlacement
from tests import encoders, toy

SPEC = WeightDecomposed(LowRank(4, 8.0))
CLASSIFY = SEQUENCE_CLASSIFICATION.with_labels(3)


def build(base: Path, **options: Any) -> AdaptedModel:
    options = {"plan": adapter_plan(SPEC), "head": CLASSIFY, "dtype": "fp32", **options}
    return build_model(base, options.pop("plan"), WholePlacement(), **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=encoders.tokens()).logits


def with_our_head(base: Path, run: AdaptedModel) -> torch.Tensor:
    """The logits of transformers' own reading of `base`, with the head (and what else was new) of `run`."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.load_state_dict({name: run.model.get_parameter(name) for name in run.fresh}, strict=False)
    return logits(model)


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_a_plain_encoder_becomes_a_classifier(family: str, tmp_path: Path) -> None:
    base = encoders.plain_encoder(tmp_path / "base", family)
    run = build(base)
    assert len(run.adapted) == 6 * 2  # the paper's six matrices a layer
    assert run.trained == (["pooler", "classifier"] if family == "deberta-v2" else ["classifier"])
    assert set(run.fresh) == {n for n, _ in run.model.named_parameters() if n.startswith(tuple(run.trained))}
    assert torch.equal(logits(run.model), with_our_head(base, run))


def test_the_families_targets_are_the_papers_matrices(tmp_path: Path) -> None:
    run = build(encoders.plain_encoder(tmp_path / "base", "roberta"))
    assert [name.removeprefix("roberta.encoder.layer.0.") for name in run.adapted[:6]] == [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]


def test_a_masked_language_model_has_no_pooler_so_it_is_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForMaskedLM.from_config(encoders.config("bert")).save_pretrained(base)
    run = build(base)
    assert run.trained == ["classifier", "bert.pooler"]
    assert sorted(run.fresh) == [f"{m}.{p}" for m in ("bert.pooler.dense", "classifier") for p in ("bias", "weight")]
    assert torch.equal(logits(run.model), with_our_head(base, run))


def test_old_layer_norms_and_strange_tensors_do_not_disturb(tmp_path: Path) -> None:
    base = encoders.plain_encoder(tmp_path / "base")
    expected = logits(build(base).model)
    tensors = load_file(base / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    assert set(old) != set(tensors)
    old["embeddings.position_ids"] = torch.arange(64)[None]
    old["cls.predictions.bias"] = torch.ones(120)
    save_file(old, base / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(build(base).model), expected)


def test_a_head_in_the_folder_is_read(tmp_path: Path) -> None:
    base = encoders.classifier(tmp_path / "base", num_labels=3)
    run = build(base)
    assert (run.trained, run.fresh) == (["classifier"], [])
    assert torch.equal(logits(run.model), logits(AutoModelForSequenceClassification.from_pretrained(base)))


def test_labels_are_counted_by_the_rows_of_what_was_trained_a_single_number_has_none(tmp_path: Path) -> None:
    trained = {"scale": torch.tensor(1.0), "classifier.weight": torch.ones(3, 20)}
    adapter = PeftAdapter(
        "base", 2, 2, 0.0, False, {}, task_type="SEQ_CLS", modules_to_save=["classifier"], trained=trained
    )
    write_peft_folder(tmp_path / "adapter", adapter)
    assert head_at(str(tmp_path / "adapter")).num_labels == 3


def test_a_head_for_other_labels_starts_anew(tmp_path: Path) -> None:
    base = encoders.classifier(tmp_path / "base", "roberta", num_labels=3)
    two = SEQUENCE_CLASSIFICATION.with_labels(2)
    run = build(base, head=two)
    shapes = {"classifier.out_proj.weight": ([3, 20], [2, 20]), "classifier.out_proj.bias": ([3], [2])}
    assert (run.fresh, run.resized) == (list(shapes), shapes)
    read = AutoModelForSequenceClassification.from_pretrained(base)
    assert torch.equal(run.model.classifier.dense.weight, read.classifier.dense.weight)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, ignore_mismatched_sizes=True)
    model.load_state_dict({name: run.model.get_parameter(name) for name in run.fresh}, strict=False)
    assert torch.equal(logits(run.model), logits(model))
    with pytest.raises(UserError, match=r"out_proj.weight'.* has shape \[3, 20\], the model needs \[2, 20\]"):
        build(base, head=two, trained_modules=["classifier.dense"])  # the rest of the head is frozen


def test_other_shapes_of_the_encoder_are_refused_even_if_trained(tmp_path: Path) -> None:
    base = encoders.plain_encoder(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "pooler.dense.bias": torch.zeros(19)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"'pooler.dense.bias' .* has shape \[19\], the model needs \[20\]"):
        build(base, trained_modules=["classifier", "pooler"])


def test_a_missing_frozen_tensor_is_still_refused(tmp_path: Path) -> None:
    base = encoders.plain_encoder(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no tensor 'bert\.encoder\.layer\.1\.output\.dense\.bias'"):
        build(base)


def test_a_new_head_follows_from_the_seed_and_transformers_scale(tmp_path: Path) -> None:
    base = encoders.plain_encoder(tmp_path / "base", "roberta", hidden_size=200, initializer_range=0.05)
    one, same, other = (build(base, seed=seed).model.classifier for seed in (1, 1, 2))
    assert torch.equal(one.dense.weight, same.dense.weight)
    assert not torch.equal(one.dense.weight, other.dense.weight)
    assert one.dense.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert one.dense.bias.abs().max() == 0


def test_only_adapters_and_trained_modules_train(tmp_path: Path) -> None:
    run = build(encoders.plain_encoder(tmp_path / "base"), trained_modules=["classifier", r".*\.layer\.1\..*LayerNorm"])
    trainable = {name for name, p in run.model.named_parameters() if p.requires_grad}
    adapters = {f"{n}.{p}" for n in run.adapted for p in ("lora_A", "lora_B", "magnitude_offset")}
    norms = ("bert.encoder.layer.1.attention.output.LayerNorm", "bert.encoder.layer.1.output.LayerNorm")
    assert run.trained == [*norms, "classifier"]
    assert trainable == adapters | {f"{n}.{p}" for n in (*norms, "classifier") for p in ("weight", "bias")}
    assert run.fresh == ["classifier.weight", "classifier.bias"]


def test_trained_modules_that_cannot_be_are_refused(tmp_path: Path) -> None:
    base = encoders.plain_encoder(tmp_path / "base")
    with pytest.raises(UserError, match=r"'head' matches no module.*: bert, classifier"):
        build(base, trained_modules=["head"])
    with pytest.raises(UserError, match=r"both match 'bert.encoder.layer.0.attention.self.query'"):
        build(base, trained_modules=["layer.0"])


def test_a_tied_head_that_is_trained_gets_a_weight_of_its_own(tmp_path: Path) -> None:
    tied = toy.base_model(tmp_path / "tied", tie_word_embeddings=True)
    run = build(tied, head=CAUSAL_LM, trained_modules=["lm_head"])
    head, embedding = run.model.get_parameter("lm_head.weight"), run.model.get_parameter("model.embed_tokens.weight")
    assert head is not embedding and torch.equal(head, embedding)
    assert head.requires_grad and not embedding.requires_grad
    assert run.untied == ["lm_head.weight"] and run.fresh == []


def test_the_outermost_module_is_meant() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}), "b": torch.nn.Linear(2, 2)})
    assert trained_in_full(model, ["a"]) == ["a"]
    inject(model, by_pattern(WeightDecomposed(LowRank(2)), ["b"]), ["a"])
    assert [n for n, p in model.named_parameters() if p.requires_grad and n.startswith("a")] == [
        "a.a.weight",
        "a.a.bias",
    ]


# --- PEFT -------------------------------------------------------------------------------------------------------------


def peft_adapter(folder: Path, base: Path, **options: Any) -> torch.Tensor:
    """Save an adapter that PEFT made over a classifier, with random values; returns its logits."""
    from peft import LoraConfig, get_peft_model

    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    settings = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["query", "output.dense"]}
    model = get_peft_model(model, LoraConfig(**(settings | options)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(str(folder))
    return logits(model)


@pytest.mark.parametrize(
    ("family", "options", "saved"),
    [
        ("roberta", {"task_type": "SEQ_CLS"}, ["classifier"]),  # PEFT adds "score", which the model has not
        ("bert", {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}, ["bert.pooler", "classifier"]),
        ("deberta-v2", {"modules_to_save": ["pooler", "classifier"]}, ["pooler", "classifier"]),
    ],
)
def test_pefts_saved_modules_come_in_and_go_out(family: str, options: dict, saved: list, tmp_path: Path) -> None:
    from peft import PeftModel

    base = encoders.plain_encoder(tmp_path / "base", family)
    if family == "deberta-v2":
        options = {**options, "target_modules": ["query_proj", "output.dense"]}
    expected = peft_adapter(tmp_path / "peft", base, **options)
    adapter = read_peft_folder(tmp_path / "peft")
    assert sorted(adapter.modules_to_save) == sorted(saved)
    adapter.model_config = {"architectures": [f"{family}?"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    adapter.base_model, adapter.task_type = str(base), "SEQ_CLS"
    write_peft_folder(tmp_path / "ours", adapter)
    again: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(again, tmp_path / "ours")), expected, atol=1e-6, rtol=0)
    ours, _ = load_for_inference(str(tmp_path / "ours"), "fp32")
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=0)
    if "task_type" in options:  # else it does not say what it is for
        rename = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        rename["base_model_name_or_path"] = str(base)
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(rename))
        assert head_at(str(tmp_path / "peft")) == CLASSIFY
        theirs, _ = load_for_inference(str(tmp_path / "peft"), "fp32")
        torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=0)


def test_tensors_of_modules_that_were_not_saved_are_still_refused(tmp_path: Path) -> None:
    base = encoders.plain_encoder(tmp_path / "base")
    peft_adapter(tmp_path / "peft", base, modules_to_save=["classifier"])
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.bert.pooler.dense.bias": torch.ones(20)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"pooler.dense.bias' is not supported"):
        read_peft_folder(tmp_path / "peft")


@pytest.mark.parametrize("kind", ["plain", "head"])
def test_consolidating_writes_the_trained_modules(kind: str, tmp_path: Path) -> None:
    make = encoders.plain_encoder if kind == "plain" else encoders.classifier
    base = make(tmp_path / "base", "roberta", **({} if kind == "plain" else {"num_labels": 3}))
    expected = peft_adapter(tmp_path / "peft", base, task_type="SEQ_CLS")
    adapter = read_peft_folder(tmp_path / "peft")
    labels = {"0": "worse", "1": "same", "2": "better"}
    adapter.model_config = {"architectures": ["RobertaForSequenceClassification"], "id2label": labels}
    write_peft_folder(tmp_path / "ours", adapter)
    result = consolidate(tmp_path / "ours", base, tmp_path / "merged", progress=False)
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "worse", 1: "same", 2: "better"}
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert result["tensors"] == len(written)
    assert {n.partition(".")[0] for n in written} == {"roberta", "classifier"}
    read, _ = build_and_read(tmp_path / "merged")
    torch.testing.assert_close(logits(read), expected, atol=1e-5, rtol=0)


def test_a_language_models_own_head_can_be_trained_in_full(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = toy.base_model(tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], use_dora=True)
    model = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(tmp_path / "peft"))
    consolidate(tmp_path / "peft", base, tmp_path / "merged", progress=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    unmerged, _ = load_for_inference(str(tmp_path / "peft"), "fp32")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(unmerged), logits(model), atol=1e-5, rtol=0)
    strange = toy.base_model(tmp_path / "strange", vocab_size=310)
    with pytest.raises(UserError, match=r"it trained 'lm_head.weight' as \(300, 36\), but .* has it as \(310, 36\)"):
        consolidate(tmp_path / "peft", strange, tmp_path / "never", progress=False)


def build_and_read(folder: Path) -> tuple[Any, list[str]]:
    """A merged folder as the base of a next adapter."""
    run = build(folder)
    return run.model, run.fresh
