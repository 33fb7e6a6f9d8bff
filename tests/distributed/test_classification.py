"""Encoders on real ranks: losses and metrics do not know how many ranks there are; what is saved is the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_dist.checkpoint import run_folder
from tests import encoders, toy
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classification")
    encoders.plain_encoder(folder / "bert")
    encoders.plain_encoder(folder / "roberta", "roberta")
    unpadded(toy.base_model(folder / "llama"))
    encoders.write_labelled(folder / "labels.json", 27)  # 22 to train on: the fourth global batch has 4
    encoders.write_labelled(folder / "ratings.json", 27, rating=True)
    return folder


def unpadded(base: Path) -> None:
    """Take the padding token out of a folder, as most LLaMAs have none."""
    for name, field in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**settings, field: None}))


def classify(folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {
        "model": {"task": "sequence_classification", "num_labels": 2},
        "adapter": {"target_modules": None},
        "data": {"format": "classification", "text_fields": ["sentence1", "sentence2"], "cutoff_len": 32},
        "training": {"eval_every": 3, "metric": "accuracy"},
        "checkpoint": {"keep_best": True},
    }
    merged = {section: {**fields.get(section, {}), **changes.get(section, {})} for section in {**fields, **changes}}
    return config(folder / "bert", folder / "labels.json", folder / name, **merged)


def rate(folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    return classify(
        folder,
        name,
        model={"path": str(folder / "roberta"), "num_labels": 1},
        data={"train": str(folder / "ratings.json")},
        training={"metric": "pearson", **changes.pop("training", {})},
        **changes,
    )


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    """What does not depend on the machine's speed, line by line."""
    lines = run_folder.metrics(folder / name)
    kept = [{k: v for k, v in line.items() if k in ("step", "loss", "grad_norm") or "eval" in k} for line in lines]
    return [line for line in kept if line.keys() != {"step"}]  # a line about a save comes when the save has ended


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """Six steps of a classification and a rating at worlds 1, 2 and 3, and resumed at another."""
    checkpointed = {"activation_checkpointing": True}
    run_ranks(run, 1, classify(folder, "one"), rate(folder, "rate-one"))
    again = {"resume": str(folder / "one" / "checkpoint-3"), "keep_best": True}
    bf16 = classify(folder, "bf16", model={"path": str(folder / "roberta"), "dtype": "bf16"})
    larger = {"micro_batch_size": 3}
    decoder = classify(folder, "decoder", model={"path": str(folder / "llama")}, training=larger)
    run_ranks(
        run, 2, classify(folder, "two", training=larger), rate(folder, "rate-two", training=checkpointed), bf16, decoder
    )
    run_ranks(run, 3, classify(folder, "three"), classify(folder, "three-from-one", checkpoint=again))
    return folder


@pytest.mark.parametrize(("name", "like"), [("two", "one"), ("three", "one"), ("rate-two", "rate-one")])
def test_losses_and_metrics_do_not_know_the_ranks(runs: Path, name: str, like: str) -> None:
    found, expected = metrics(runs, name), metrics(runs, like)
    assert len(found) == len(expected) >= 8
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, abs=2e-5)
    reported = {key for line in found for key in line if key.startswith("eval_")}
    wanted = ["pearson", "spearman"] if name.startswith("rate") else ["accuracy", "matthews", "f1"]
    assert reported == {"eval_loss", *(f"eval_{metric}" for metric in wanted)}


def test_the_head_trains_in_bf16(runs: Path) -> None:
    losses = [line["loss"] for line in metrics(runs, "bf16") if "loss" in line]
    assert losses[-1] < losses[0] - 0.005
    start, end = (load_file(runs / "bf16" / f"checkpoint-{step}" / "state.safetensors") for step in (3, 6))
    moved = (end["classifier.dense.weight.master"] - start["classifier.dense.weight.master"]).abs()
    assert (moved > 0).float().mean() > 0.9


def test_a_run_goes_on_at_another_world_size(runs: Path) -> None:
    later = [line for line in metrics(runs, "one") if line["step"] > 3]
    for line, other in zip(metrics(runs, "three-from-one"), later, strict=True):
        assert line == pytest.approx(other, abs=2e-5)


def test_the_head_is_the_same_at_every_world_size_and_moves(runs: Path) -> None:
    start = [load_file(runs / name / "checkpoint-3" / "state.safetensors") for name in ("one", "three")]
    assert torch.allclose(start[0]["classifier.weight.master"], start[1]["classifier.weight.master"], atol=1e-5)
    end = load_file(runs / "one" / "checkpoint-6" / "state.safetensors")
    assert (end["classifier.weight.master"] - start[0]["classifier.weight.master"]).abs().max() > 1e-3


def test_the_best_checkpoint_is_by_the_metric(runs: Path) -> None:
    for name, metric in (("two", "eval_accuracy"), ("rate-two", "eval_pearson")):
        best = json.loads((runs / name / "best.json").read_text())
        evaluations = {line["step"]: line[metric] for line in metrics(runs, name) if metric in line}
        assert best[metric] == max(evaluations.values())
        assert best["checkpoint"] == f"checkpoint-{max(evaluations, key=lambda step: (evaluations[step], -step))}"


@pytest.mark.parametrize(("name", "base", "labels"), [("two", "bert", 2), ("rate-two", "roberta", 1)])
def test_merged_unmerged_and_peft_give_the_same_logits(runs: Path, name: str, base: str, labels: int) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from dora_dist.checkpoint.consolidate import consolidate
    from dora_dist.evaluation.inference import load_for_inference

    adapter, ids = runs / name / "checkpoint-6" / "adapter", encoders.tokens()
    consolidate(adapter, runs / base, runs / f"merged-{name}", progress=False)
    merged: Any = AutoModelForSequenceClassification.from_pretrained(runs / f"merged-{name}")
    plain: Any = AutoModelForSequenceClassification.from_pretrained(runs / base, num_labels=labels)
    peft = PeftModel.from_pretrained(plain, str(adapter))
    unmerged, tokenizer = load_for_inference(str(adapter), dtype="fp32")
    with torch.no_grad():
        found = [model.eval()(input_ids=ids).logits for model in (merged, peft, unmerged)]
    assert found[0].shape == (3, labels) and tokenizer.pad_token_id == 0
    assert (found[0] - found[2]).abs().max() <= 1e-5
    assert (found[1] - found[2]).abs().max() <= 1e-5
    assert merged.config.problem_type == ("regression" if labels == 1 else "single_label_classification")


def test_a_decoder_without_a_padding_token_pads_the_same_in_training_evaluation_and_merged(runs: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from dora_dist.checkpoint.consolidate import consolidate
    from dora_dist.evaluation.inference import load_for_inference
    from dora_dist.evaluation.run import evaluate

    adapter = runs / "decoder" / "checkpoint-6" / "adapter"
    consolidate(adapter, runs / "llama", runs / "merged-decoder", progress=False)
    assert json.loads((runs / "merged-decoder" / "config.json").read_text())["pad_token_id"] == 2
    merged: Any = AutoModelForSequenceClassification.from_pretrained(runs / "merged-decoder")
    unmerged, tokenizer = load_for_inference(str(adapter), dtype="fp32")
    assert tokenizer.pad_token_id == unmerged.config.pad_token_id == 2
    long, short = toy.tokens()[0], toy.tokens()[1, :5]
    padded = torch.stack([long, torch.cat([short, torch.full((12,), 2)])])
    with torch.no_grad():
        alone = [unmerged(input_ids=ids[None]).logits[0] for ids in (long, short)]
        for model in (unmerged, merged.eval()):
            found = model(input_ids=padded, attention_mask=(padded != 2).long()).logits
            assert (found - torch.stack(alone)).abs().max() <= 1e-5
    # The whole validation set again, one text at a time, where nothing is padded but to a multiple of 8.
    scores = [
        evaluate(str(runs / name), {"all": runs / "labels.json"}, batch_size=size, progress=False, **options)
        for name, size, options in (
            ("decoder/checkpoint-6", 1, {}),
            ("decoder/checkpoint-6", 27, {}),
            ("merged-decoder", 4, {"fields": {"text_fields": ["sentence1", "sentence2"], "cutoff_len": 32}}),
        )
    ]
    losses = [score["tasks"]["all"]["loss"] for score in scores]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def goes_on(same: dict[str, Any], other: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Train `same`; then `other`, expecting a UserError."""
    from dora_dist.runtime.errors import UserError

    [result] = run(same)
    try:
        run(other)
    except UserError as error:
        return result, str(error)
    raise AssertionError("the run should have been refused")


def test_training_goes_on_from_an_adapter_with_the_same_head(runs: Path) -> None:
    start = {"target_modules": None, "init_from": str(runs / "one" / "checkpoint-6" / "adapter")}
    short = {"max_steps": 1, "eval_every": None, "metric": "loss"}
    same = classify(runs, "goes-on", adapter=start, training=short)
    three = classify(runs, "other-head", adapter=start, training=short, model={"num_labels": 3})
    [(result, message)] = run_ranks(goes_on, 1, same, three)
    assert result["losses"][1] < metrics(runs, "one")[0]["loss"]
    assert "'classifier.weight' has shape [2, 20] in " in message
    assert "and [3, 20] here; set model.num_labels" in message
