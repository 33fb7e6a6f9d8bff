"""Summarisation on real ranks: losses and ROUGE do not know how many there are, and are transformers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.evaluation import evaluate
from tests import summaries
from tests.distributed.test_classification import metrics
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks

STEPS, HELD_OUT = 30, 11


def summarise(folder: Path, name: str, **training: Any) -> dict[str, Any]:
    return config(
        folder / "base",
        folder / "train.json",
        folder / name,
        model={"task": "seq2seq_lm"},
        adapter={"target_modules": None},
        data={
            "validation": str(folder / "validation.json"),
            "validation_samples": 0,
            "format": "summarisation",
            "text_fields": ["document"],
            "label_field": "summary",
            "cutoff_len": 40,
            "target_len": 12,
        },
        training={"max_steps": STEPS, "eval_every": 15, "metric": "rougeL", "num_beams": 2, **training},
        checkpoint={"save_every": STEPS},
        engine={"param_persistence_threshold": 400},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("summaries")
    summaries.base_model(folder / "base", encoder_layers=1, decoder_layers=1)
    records = summaries.records(40 + HELD_OUT)
    (folder / "train.json").write_text(json.dumps(records[HELD_OUT:]))
    (folder / "validation.json").write_text(json.dumps(records[:HELD_OUT]))
    run_ranks(run, 1, summarise(folder, "one", micro_batch_size=3))
    run_ranks(run, 2, summarise(folder, "two", micro_batch_size=3, activation_checkpointing=True))
    return folder


def test_losses_and_rouge_do_not_know_the_ranks(runs: Path) -> None:
    found, expected = metrics(runs, "two"), metrics(runs, "one")
    assert len(found) == len(expected) == STEPS + 2
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, abs=1e-3)
    keys = {"eval_loss", "eval_rouge1", "eval_rouge2", "eval_rougeL"}
    assert {key for line in found for key in line if "eval" in key} == keys
    losses = [line["loss"] for line in found if "loss" in line]
    assert losses[-1] < losses[0] - 2


def test_merged_unmerged_and_peft_give_the_same_logits_and_summaries(runs: Path) -> None:
    from peft import PeftModel
    from rouge_score.rouge_scorer import RougeScorer
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from dora_dist.consolidate import consolidate
    from dora_dist.models.inference import load_for_inference

    adapter = runs / "two" / f"checkpoint-{STEPS}" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    consolidate(adapter, runs / "base", runs / "merged", progress=False)
    merged: Any = AutoModelForSeq2SeqLM.from_pretrained(runs / "merged").eval()
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(runs / "base")
    unmerged, _ = load_for_inference(str(runs / "two"), "fp32")
    tokenizer: Any = AutoTokenizer.from_pretrained(runs / "merged")
    records = json.loads((runs / "validation.json").read_text())
    batch = tokenizer([record["document"] for record in records], padding=True, return_tensors="pt")
    labels = tokenizer(text_target=[record["summary"] for record in records], padding=True, return_tensors="pt")
    ids = labels["input_ids"]
    with torch.no_grad():
        before = plain.eval()(**batch, labels=ids).logits
        peft = PeftModel.from_pretrained(plain, str(adapter)).eval()
        found = [model(**batch, labels=ids).logits for model in (merged, unmerged, peft)]
        assert (found[0] - found[1]).abs().max() <= 1e-4
        assert (found[0] - found[2]).abs().max() <= 1e-4
        assert (found[0] - before).abs().max() > 1
        summaries_ids = [merged.generate(**batch_of(tokenizer, r), num_beams=2, max_new_tokens=12)[0] for r in records]
    assert len({len(one) for one in summaries_ids}) > 1  # ranks are done at different times
    texts = tokenizer.batch_decode(summaries_ids, skip_special_tokens=True)
    for kind in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([kind], use_stemmer=True)
        scores = [scorer.score(r["summary"], text)[kind].fmeasure for r, text in zip(records, texts, strict=True)]
        expected = sum(scores) / HELD_OUT
        assert expected > 0.05 or kind == "rouge2"
        for name in ("one", "two"):
            last = [line for line in metrics(runs, name) if "eval_loss" in line][-1]
            assert last[f"eval_{kind}"] == pytest.approx(expected, abs=1e-9)


def batch_of(tokenizer: Any, record: dict[str, str]) -> Any:
    return tokenizer([record["document"]], return_tensors="pt")


def test_evaluating_the_run_gives_what_it_reported(runs: Path) -> None:
    last = [line for line in metrics(runs, "two") if "eval_loss" in line][-1]
    result = evaluate(str(runs / "two"), {"films": runs / "validation.json"}, batch_size=4, progress=False)
    assert result["task"] == "seq2seq_lm" and result["tasks"]["films"]["total"] == HELD_OUT
    for key, value in last.items():
        if key.startswith("eval_"):
            assert result["tasks"]["films"][key.removeprefix("eval_")] == pytest.approx(value, abs=1e-5)
