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

STEPS, HELD_OUT, LONGEST = 30, 11, 12


def summarise(folder: Path, name: str, base: str = "base", **training: Any) -> dict[str, Any]:
    data = {"format": "summarisation", "text_fields": ["document"], "label_field": "summary"}
    held_out = {"validation": str(folder / "validation.json"), "validation_samples": 0}
    return config(
        folder / base,
        folder / "train.json",
        folder / name,
        model={"task": "seq2seq_lm"},
        adapter={"target_modules": None},
        data={**data, **held_out, "cutoff_len": 40, "target_len": LONGEST},
        training={"max_steps": STEPS, "eval_every": 15, "metric": "rougeL", "num_beams": 2, **training},
        checkpoint={"save_every": STEPS},
        engine={"param_persistence_threshold": 400},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at worlds 1 and 2; and the evaluation of an untrained model whose summaries end early and late."""
    folder = tmp_path_factory.mktemp("summaries")
    summaries.base_model(folder / "base", encoder_layers=1, decoder_layers=1)
    summaries.base_model(folder / "ends", end_bias=8.5, encoder_layers=1, decoder_layers=1)
    records = summaries.records(40 + HELD_OUT)
    (folder / "train.json").write_text(json.dumps(records[HELD_OUT:]))
    (folder / "validation.json").write_text(json.dumps(records[:HELD_OUT]))
    only_evaluated = {"max_steps": 1, "eval_every": 1}  # the first step of a warm-up changes nothing
    for world, more in ((1, {}), (2, {"activation_checkpointing": True})):
        trained = summarise(folder, f"trained-{world}", micro_batch_size=3, **more)
        run_ranks(run, world, trained, summarise(folder, f"ends-{world}", "ends", **only_evaluated))
    return folder


def test_losses_and_rouge_do_not_know_the_ranks(runs: Path) -> None:
    found, expected = metrics(runs, "trained-2"), metrics(runs, "trained-1")
    assert len(found) == len(expected) == STEPS + 2
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, abs=1e-3)
    keys = {"eval_loss", "eval_rouge1", "eval_rouge2", "eval_rougeL"}
    assert {key for line in found for key in line if "eval" in key} == keys
    losses = [line["loss"] for line in found if "loss" in line]
    assert losses[-1] < losses[0] - 2


def test_merged_unmerged_and_peft_give_the_same_logits(runs: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from dora_dist.evaluation.inference import load_for_inference

    merged: Any = AutoModelForSeq2SeqLM.from_pretrained(consolidated(runs)).eval()
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(runs / "base")
    unmerged, _ = load_for_inference(str(runs / "trained-2"), "fp32")
    tokenizer: Any = AutoTokenizer.from_pretrained(runs / "base")
    records = json.loads((runs / "validation.json").read_text())
    batch = tokenizer([record["document"] for record in records], padding=True, return_tensors="pt")
    labels = tokenizer(text_target=[record["summary"] for record in records], padding=True, return_tensors="pt")
    ids = labels["input_ids"]
    with torch.no_grad():
        before = plain.eval()(**batch, labels=ids).logits
        peft = PeftModel.from_pretrained(plain, str(adapter(runs))).eval()
        found = [model(**batch, labels=ids).logits for model in (merged, unmerged, peft)]
    assert (found[0] - found[1]).abs().max() <= 1e-4
    assert (found[0] - found[2]).abs().max() <= 1e-4
    assert (found[0] - before).abs().max() > 1


@pytest.mark.parametrize("name", ["trained", "ends"])
def test_rouge_is_the_packages_own_of_what_transformers_writes(name: str, runs: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = consolidated(runs) if name == "trained" else runs / "ends"
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    records = json.loads((runs / "validation.json").read_text())
    documents = [tokenizer([record["document"]], return_tensors="pt") for record in records]
    written = [model.generate(**document, num_beams=2, max_new_tokens=LONGEST)[0] for document in documents]
    if name == "ends":  # ranks are done at different times
        assert len({len(tokens) for tokens in written}) > 2
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    for kind in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([kind], use_stemmer=True)
        scores = [scorer.score(r["summary"], text)[kind].fmeasure for r, text in zip(records, texts, strict=True)]
        assert sum(scores) > 0 or kind == "rouge2"
        for world in (1, 2):
            last = [line for line in metrics(runs, f"{name}-{world}") if "eval_loss" in line][-1]
            assert last[f"eval_{kind}"] == pytest.approx(sum(scores) / HELD_OUT, abs=1e-9)


def test_evaluating_the_run_gives_what_it_reported(runs: Path) -> None:
    last = [line for line in metrics(runs, "trained-2") if "eval_loss" in line][-1]
    result = evaluate(runs / "trained-2", {"films": runs / "validation.json"}, batch_size=4, progress=False)
    assert result["task"] == "seq2seq_lm" and result["tasks"]["films"]["total"] == HELD_OUT
    for key, value in last.items():
        if key.startswith("eval_"):
            assert result["tasks"]["films"][key.removeprefix("eval_")] == pytest.approx(value, abs=1e-5)


def adapter(runs: Path) -> Path:
    return runs / "trained-2" / f"checkpoint-{STEPS}" / "adapter"


def consolidated(runs: Path) -> Path:
    from dora_dist.checkpoint.consolidate import consolidate

    assert json.loads((adapter(runs) / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    consolidate(adapter(runs), runs / "base", runs / "merged", overwrite=True, progress=False)
    return runs / "merged"
