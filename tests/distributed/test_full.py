"""Full fine-tuning on real ranks against a plain loop in one process; single parameters besides adapters."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_dist.adapters.patterns import parameters_matching
from dora_dist.checkpoint.adapter_folders import find_adapter
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.checkpoint.state import Masters, open_state
from dora_dist.config import RunConfig
from dora_dist.evaluation.inference import load_for_inference, tokenizer_at
from dora_dist.weights.safetensors_io import TensorFolder
from tests import encoders, llava, toy
from tests.distributed.training_runs import config, metrics, run
from tests.ranks import run_ranks

STEPS, RATE, WARMUP, DECAY = 6, 3e-3, 2, 0.1
DATA: dict[str, Any] = {"cutoff_len": 40}
SHORT: dict[str, Any] = {"max_steps": 2, "warmup_steps": 0, "global_batch_size": 4, "micro_batch_size": 2}
FULL: dict[str, Any] = {"method": "full"}
CHOSEN: dict[str, Any] = {"method": "full", "target_modules": ["layers.1.mlp", r"model\.norm"]}
SINGLE: dict[str, Any] = {
    "r": 4,
    "target_modules": ["q_proj", "down_proj"],
    "trained_parameters": ["bias", r".*norm\.weight"],
}


def sections(folder: Path, name: str, adapter: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """Every step is on all 20 records, so no order of them is part of what is compared."""
    base = "biased" if "trained_parameters" in adapter else "base"
    training = {"learning_rate": RATE, "weight_decay": DECAY, "global_batch_size": 20, "micro_batch_size": 3}
    made = config(folder / base, folder / "data.json", folder / name, training=training, data=DATA, **changes)
    return made | {"adapter": adapter}


def classifier(folder: Path) -> dict[str, Any]:
    data = {"format": "classification", "text_fields": ["sentence1", "sentence2"], "cutoff_len": 32}
    model = {"task": "sequence_classification", "num_labels": 2}
    made = config(folder / "bert", folder / "labels.json", folder / "labels", model=model, data=data, training=SHORT)
    return made | {"adapter": FULL}


def pictured(folder: Path) -> dict[str, Any]:
    pictures = str(folder / "chats" / "pictures")
    data = {
        "format": "llava",
        "image_folder": pictures,
        "loss_on": "answer",
        "cutoff_len": 256,
        "validation_samples": 0,
    }
    task = {"task": "image_text_to_text"}
    made = config(
        folder / "llava", folder / "chats" / "data.json", folder / "pictured", model=task, data=data, training=SHORT
    )
    return made | {"adapter": FULL}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    toy.base_model(folder / "base", tie_word_embeddings=True)
    toy.base_model(folder / "biased", attention_bias=True)
    toy.write_records(folder / "data.json", 25)
    encoders.plain_encoder(folder / "bert")
    encoder = folder / "bert" / "model.safetensors"  # as roberta-base has it: its first tensor holds no numbers
    save_file({"embeddings.position_ids": torch.arange(64)[None], **load_file(encoder)}, encoder, {"format": "pt"})
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = "of the run's own tokenizer"
    tokenizer.save_pretrained(folder / "tokenizer")
    encoders.write_labelled(folder / "labels.json", 9)
    llava.model(folder / "llava")
    llava.write(folder / "chats", 4, 2)
    run_ranks(
        run,
        1,
        sections(folder, "one", FULL),
        sections(folder, "chosen", CHOSEN, model={"tokenizer": str(folder / "tokenizer")}),
        classifier(folder),
        pictured(folder),
    )
    run_ranks(
        run,
        2,
        sections(folder, "two", FULL, engine={"param_persistence_threshold": 40}),
        sections(folder, "two-again", FULL, checkpoint={"resume": str(folder / "two" / "checkpoint-3")}),
        sections(folder, "lora", SINGLE | {"weight_decomposed": False}),
        sections(folder, "dora", SINGLE | {"trained_modules": ["lm_head"]}),
    )
    again = {"resume": str(folder / "two" / "checkpoint-3")}
    run_ranks(run, 3, sections(folder, "three", FULL), sections(folder, "three-from-two", FULL, checkpoint=again))
    return folder


def plain(base: Path, data: Path, trained: list[str] | None) -> tuple[dict[int, float], Any]:
    """AdamW over a transformers model: linear warm-up and decay, clipping at 1, no decay of norms; losses by step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dora_dist.training.inputs import read_data

    _, read = read_data(RunConfig.from_dict(config(base, data, base, data=DATA)), base, progress=False)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = parameters_matching(model, trained) if trained else [name for name, _ in model.named_parameters()]
    model.requires_grad_(False)
    own = [model.get_parameter(name).requires_grad_() for name in names]
    groups = [
        {"params": [p for p in own if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in own if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    assert AutoTokenizer.from_pretrained(base).pad_token_id == 0
    losses = {}
    for step in range(STEPS):
        sums, count = [], 0
        for sample in read.train:
            ids = torch.as_tensor(sample["input_ids"])[None]
            logits = model(input_ids=ids).logits[0, :-1]
            sums.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        loss = torch.stack(sums).sum() / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))
        optimizer.step()
        losses[step + 1] = loss.item()
    return losses, model


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[dict[int, float], Any]:
    return plain(folder / "base", folder / "data.json", None)


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_losses_are_those_of_a_plain_loop_at_every_world_size(
    folder: Path, expected: tuple[dict[int, float], Any], name: str
) -> None:
    assert metrics(folder / name)["losses"] == pytest.approx(expected[0], abs=1e-5)
    assert expected[0][1] - expected[0][6] > 0.3


def test_chosen_modules_alone_are_trained(folder: Path) -> None:
    losses, model = plain(folder / "base", folder / "data.json", [r".*layers\.1\.mlp\..*", r"model\.norm\.weight"])
    assert metrics(folder / "chosen")["losses"] == pytest.approx(losses, abs=1e-5)
    masters = Masters(open_state(folder / "chosen" / "checkpoint-6"))
    assert set(masters) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(toy.relative_error(masters[name], model.get_parameter(name)) < 1e-4 for name in masters)


def test_a_resumed_run_is_the_uninterrupted_one_at_another_world_size_too(folder: Path) -> None:
    whole = {step: loss for step, loss in metrics(folder / "two")["losses"].items() if step > 3}
    assert metrics(folder / "two-again")["losses"] == whole
    assert metrics(folder / "three-from-two")["losses"] == pytest.approx(whole, abs=1e-5)
    one, other = (open_state(folder / name / "checkpoint-6") for name in ("two", "two-again"))
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.entries)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(toy.tokens()).logits
    return found


@pytest.mark.parametrize("name", ["two", "chosen"])
def test_the_merged_model_and_the_evaluated_run_are_the_trained_model(folder: Path, name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = folder / name / "checkpoint-6"
    assert not (checkpoint / "adapter").exists()
    trained: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    for parameter, values in Masters(open_state(checkpoint)).items():
        trained.get_parameter(parameter).data.copy_(values)
    found, base = find_adapter(folder / name)
    assert base is not None
    result = consolidate(found, base, tmp_path / "merged", progress=False)
    assert (result["merged"], set(load_file(tmp_path / "merged" / "model.safetensors"))) == (
        0,
        set(load_file(folder / "base" / "model.safetensors")),
    )
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert (logits(merged) - logits(trained)).abs().max() < 1e-4
    evaluated, _ = load_for_inference(str(folder / name), "fp32")
    assert (logits(evaluated) - logits(trained)).abs().max() < 1e-4
    (folder / "tokenizer").rename(tmp_path / "gone")  # what the run was given; its checkpoints have their own
    for place in (found, tmp_path / "merged"):
        template = tokenizer_at(str(place)).chat_template
        assert template == ("of the run's own tokenizer" if name == "chosen" else None)
    (tmp_path / "gone").rename(folder / "tokenizer")
    assert (logits(trained) - logits(AutoModelForCausalLM.from_pretrained(folder / "base"))).abs().max() > 0.02


def test_a_base_that_stores_a_tied_weight_twice_gets_both_replaced(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    doubled = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(doubled, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    consolidate(folder / "two" / "checkpoint-6", tmp_path / "base", tmp_path / "merged", progress=False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_biases_and_norms_besides_an_adapter_are_the_same_in_peft_merged_and_evaluated(
    folder: Path, name: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = folder / name / "checkpoint-6"
    masters, before = Masters(open_state(checkpoint)), load_file(folder / "biased" / "model.safetensors")
    single = [n for n in masters if n.endswith(("bias", "norm.weight"))]
    assert len(single) == 2 * 4 + 2 * 2 + 1
    assert all(not torch.equal(masters[n], before[n]) for n in single)
    consolidate(checkpoint / "adapter", folder / "biased", tmp_path / "merged", progress=False)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert all(torch.equal(merged.get_parameter(n), masters[n]) for n in single)
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "biased", dtype=torch.float32)
    peft: Any = PeftModel.from_pretrained(base, str(checkpoint / "adapter"))
    evaluated, _ = load_for_inference(str(checkpoint), "fp32")
    for other in (peft, evaluated):
        assert (logits(other) - logits(merged)).abs().max() < 1e-4
    peft.save_pretrained(str(tmp_path / "again"))  # what PEFT knows of it, it keeps
    base = AutoModelForCausalLM.from_pretrained(folder / "biased", dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path / "again"))), logits(peft))
    losses = metrics(folder / name)["losses"]
    assert losses[6] < losses[1] - 0.05


def test_a_whole_classifier_has_its_new_head_and_labels_once_merged(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    found, base = find_adapter(folder / "labels")
    assert base is not None
    masters = Masters(open_state(found))
    consolidate(found, base, tmp_path / "merged", progress=False)
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert {name for name, _ in merged.named_parameters()} == set(masters)
    assert all(torch.equal(merged.get_parameter(name), masters[name]) for name in masters)
    evaluated, _ = load_for_inference(str(folder / "labels"), "fp32")
    with torch.no_grad():
        assert torch.equal(evaluated(encoders.tokens()).logits, merged.eval()(encoders.tokens()).logits)


def test_a_llavas_tower_stays_as_it_was(folder: Path, tmp_path: Path) -> None:
    found, base = find_adapter(folder / "pictured")
    assert base is not None
    consolidate(found, base, tmp_path / "merged", progress=False)
    before, after = (TensorFolder.open(place) for place in (folder / "llava", tmp_path / "merged"))
    assert before.entries.keys() == after.entries.keys()
    same = {name for name in before.entries if torch.equal(before.read(name), after.read(name))}
    assert same == {name for name in before.entries if "vision_tower" in name}
    evaluated, _ = load_for_inference(str(folder / "pictured"), "fp32")
    norm = next(name for name in after.entries if name.endswith("model.norm.weight"))
    assert torch.equal(evaluated.model.language_model.norm.weight, after.read(norm))
