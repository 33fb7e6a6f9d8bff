"""Question answering on real ranks: losses and metrics do not know how many there are, the head is saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import encoders
from tests.distributed.test_classification import metrics
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks


def answering(folder: Path, name: str, **training: Any) -> dict[str, Any]:
    return config(
        folder / "base",
        folder / "questions.json",
        folder / name,
        model={"task": "question_answering"},
        adapter={"target_modules": None},
        data={"format": "squad", "cutoff_len": 24, "doc_stride": 6},
        training={"eval_every": 3, "metric": "f1", **training},
    )


def test_losses_metrics_and_what_is_saved(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForQuestionAnswering

    from dora_dist.checkpoint.consolidate import consolidate

    encoders.plain_encoder(tmp_path / "base")
    (tmp_path / "questions.json").write_text(json.dumps(encoders.questions(27)))
    run_ranks(run, 1, answering(tmp_path, "one", micro_batch_size=2))
    run_ranks(run, 2, answering(tmp_path, "two"))
    found, expected = metrics(tmp_path, "two"), metrics(tmp_path, "one")
    assert len(found) == len(expected) >= 8
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, abs=2e-5)
    assert {key for line in found for key in line if "eval" in key} == {"eval_loss", "eval_f1", "eval_exact_match"}
    losses = [line["loss"] for line in found if "loss" in line]
    assert losses[-1] < losses[0] - 0.02

    adapter, ids = tmp_path / "two" / "checkpoint-6" / "adapter", encoders.tokens()
    consolidate(adapter, tmp_path / "base", tmp_path / "merged", progress=False)
    merged: Any = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged")
    plain: Any = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(plain, str(adapter))
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).start_logits for model in (merged, peft)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
