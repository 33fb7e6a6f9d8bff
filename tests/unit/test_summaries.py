"""Summarisation: what is read, a small BART of the real class with and without adapters, ROUGE, what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from dora_dist.adapters.methods import LowRank, WeightDecomposed
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.config import RunConfig
from dora_dist.data import SummaryReader, TokenizedData, read
from dora_dist.evaluation.inference import head_at, load_for_inference
from dora_dist.metrics.rouge import rouge_metrics
from dora_dist.models.build import AdaptedModel, build_model
from dora_dist.models.families import adapter_plan
from dora_dist.models.heads import SEQ2SEQ_LM
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import problems
from dora_dist.tasks.objectives.summaries import Summarising
from dora_dist.weights.placement import WholePlacement
from tests import summaries

MODEL = {"path": "org/model", "task": "seq2seq_lm"}
FIELDS = {"format": "summarisation", "text_fields": ["document"], "label_field": "summary", "cutoff_len": 40}
TEXTS = [text for record in summaries.records(30) for text in record.values()]


def load(tmp_path: Path, records: list[dict[str, str]], **fields: Any) -> TokenizedData:
    (tmp_path / "train.json").write_text(json.dumps(records))
    data = {"train": str(tmp_path / "train.json"), **FIELDS, **fields}
    config = RunConfig.from_dict({"model": MODEL, "data": data})
    return read(SummaryReader(config.data, summaries.tokenizer(TEXTS)), config.data, seed=0, progress=False)


def test_documents_and_summaries_are_tokenized_as_the_tokenizer_does(tmp_path: Path) -> None:
    records = summaries.records(6)
    data = load(tmp_path, records)
    tokenizer = summaries.tokenizer(TEXTS)
    assert len(data.train) == 6
    for sample, record in zip(data.train, records, strict=False):
        assert sample["input_ids"] == tokenizer(record["document"])["input_ids"]
        assert sample["labels"] == tokenizer(text_target=record["summary"])["input_ids"]
        assert sample["labels"][0] == 0 and sample["labels"][-1] == 2
    assert data.train.references == [record["summary"] for record in records]


def test_each_side_has_its_own_limit(tmp_path: Path) -> None:
    whole = load(tmp_path, summaries.records(6)).train
    data = load(tmp_path, summaries.records(6), cutoff_len=20, target_len=6)
    pairs = list(zip(whole, data.train, strict=False))
    assert {len(cut["input_ids"]) for _, cut in pairs} > {20}
    for full, cut in pairs:
        for side, length in (("input_ids", 20), ("labels", 6)):
            assert len(cut[side]) == min(len(full[side]), length)
            assert cut[side][-1] == 2
    stats = data.train_stats
    assert stats.cut_documents == sum(len(full["input_ids"]) > 20 for full, _ in pairs) > 0
    assert stats.truncated == sum(len(full["labels"]) > 6 for full, _ in pairs) > 0
    assert data.train.references == whole.references
    assert [list(sample.values()) for sample in data.train.first(2)] == [list(cut.values()) for _, cut in pairs[:2]]
    with pytest.raises(UserError, match="data.target_len = 65: the model takes 64 tokens at most"):
        load(tmp_path, summaries.records(6), target_len=65)


def test_records_are_held_out(tmp_path: Path) -> None:
    data = load(tmp_path, summaries.records(10), validation_samples=3)
    assert sorted([*data.train.index, *data.validation.index]) == list(range(10))
    assert (len(data.train), len(data.validation), len(data.validation.references)) == (7, 3, 3)


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        ({"text_fields": ["a", "b"]}, {}, 'data.text_fields = ["a", "b"]: a document is one field'),
        ({"format": "instruction"}, {}, "seq2seq_lm and the format summarisation go together"),
        ({}, {"metric": "f1"}, "use loss, rouge1, rouge2, rougeL"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(data: dict, training: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        raw = {"model": MODEL, "data": {"train": "org/data", **FIELDS, **data}, "training": training}
        RunConfig.from_dict(raw, rules=problems)
    assert message in str(caught.value)


def test_records_without_a_summary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='record 1 has no "headline"; this format needs "document", "headline"'):
        load(tmp_path, summaries.records(2), label_field="headline")


def test_rouge_by_hand() -> None:
    found = rouge_metrics(["the cat sat", "Dogs!"], ["The cats lay down", "dog"])
    # First: 2 of 3 words, 2 of 4 (stemmed); 1 of 2 pairs, 1 of 3. Second: the same word, and no pair at all.
    assert found["rouge1"] == pytest.approx((2 * 2 / (3 + 4) + 1) / 2)
    assert found["rouge2"] == pytest.approx((2 * 1 / (2 + 3) + 0) / 2)
    assert found["rougeL"] == found["rouge1"]


# --- the model --------------------------------------------------------------------------------------------------------


def build(base: Path, **options: Any) -> AdaptedModel:
    plan = adapter_plan(WeightDecomposed(LowRank(4, 8.0)))
    return build_model(base, plan, WholePlacement(), head=SEQ2SEQ_LM, dtype="fp32", **options)


def logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    document, summary = (torch.randint(5, 100, (3, length), generator=generator) for length in (11, 7))
    with torch.no_grad():
        return model.eval()(input_ids=document, decoder_input_ids=summary).logits


@pytest.mark.parametrize("kind", ["BartForConditionalGeneration", "BartModel"])
def test_step_0_is_the_base(kind: str, tmp_path: Path) -> None:
    base = summaries.base_model(tmp_path / "base", kind=kind)
    run = build(base)
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(base)
    assert torch.equal(logits(run.model), logits(plain))
    assert (run.trained, run.fresh) == ([], [])
    assert run.model.lm_head.weight is run.model.model.shared.weight is run.model.model.decoder.embed_tokens.weight
    assert bool(run.model.final_logits_bias.any()) == (kind == "BartForConditionalGeneration")


def test_batches_are_those_of_transformers_collator_and_do_not_hold_the_model(tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq

    model, samples = build(summaries.base_model(tmp_path / "base")).model, load(tmp_path, summaries.records(5)).train
    tokenizer = summaries.tokenizer(TEXTS)
    aim = Summarising(tokenizer, model, 12, 1)
    found = aim.prepared(aim.collator([*samples, aim.filler]))
    rows = [{"attention_mask": [1] * len(sample["input_ids"]), **sample} for sample in (*samples, aim.filler)]
    expected = DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8)(rows)
    assert {*found} == {*expected} and all(torch.equal(found[name], expected[name]) for name in expected)
    model.register_forward_pre_hook(lambda module, inputs: None)
    pickle.dumps(aim.collator)  # as loader processes that are not forked get it


def test_the_familys_targets_are_all_projections_of_both_sides(tmp_path: Path) -> None:
    names = build(summaries.base_model(tmp_path / "base")).adapted
    linears = [n for n, m in build(tmp_path / "base").model.named_modules() if type(m).__name__ == "AdaptedLinear"]
    assert sorted(names) == sorted(linears) and len(names) == 2 * 6 + 2 * 10
    assert [n.removeprefix("model.decoder.layers.1.") for n in names if n.startswith("model.decoder.layers.1.")] == [
        *(f"{kind}_attn.{part}_proj" for kind in ("self", "encoder") for part in ("k", "v", "q", "out")),
        "fc1",
        "fc2",
    ]


def test_a_bias_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = summaries.base_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "final_logits_bias": torch.zeros(1, 7)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"'final_logits_bias' .* has shape \[1, 7\], the model needs \[1, 310\]"):
        build(base)


@pytest.mark.parametrize("kind", ["BartForConditionalGeneration", "BartModel"])
def test_pefts_folder_comes_in_and_is_merged(kind: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = summaries.base_model(tmp_path / "base", kind=kind)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(base)
    settings = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "fc2"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(tmp_path / "peft"))
    expected = logits(model)
    unmerged, tokenizer = load_for_inference(str(tmp_path / "peft"), "fp32")
    assert head_at(str(tmp_path / "peft")) == SEQ2SEQ_LM and tokenizer.eos_token_id == 2
    torch.testing.assert_close(logits(unmerged), expected, atol=1e-4, rtol=0)
    if kind == "BartModel":  # PEFT's folder does not say what class the merged one is of; ours does
        config = {"architectures": ["BartForConditionalGeneration"]}
        (tmp_path / "peft" / "model_config.json").write_text(json.dumps(config))
    consolidate(tmp_path / "peft", base, tmp_path / "merged", progress=False)
    assert head_at(str(tmp_path / "merged")) == SEQ2SEQ_LM
    merged, _ = load_for_inference(str(tmp_path / "merged"), "fp32")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
