"""lm-evaluation-harness on a run, its adapter and the merged folder, through the documents' example."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_dist import consolidate
from tests.conftest import ROOT

BEFORE = ROOT / "tests" / "before" / "files"
BASE = BEFORE / "bases" / "llama"
RECORDS = [
    {"question": "Is snow cold?", "choices": ["true", "false"], "answer": 0},
    {"question": "Is fire cold?", "choices": ["the correct answer is true", "false", "neither"], "answer": 1},
]
TASK = {
    "task": "here",
    "dataset_path": "json",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


def scored(model: Path, folder: Path, base: Path | None = None) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("lm_harness", ROOT / "examples" / "lm_harness.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found: dict[str, Any] = example.main(
        str(model), "here", str(folder), base=str(base) if base else None, dtype="fp32"
    )
    return found


def log_probs(model: Path) -> list[list[float]]:
    """Of every choice after its question, as the formula has it."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for record in RECORDS:
        prompt = tokenizer(record["question"])["input_ids"]
        row = []
        for choice in record["choices"]:
            whole = torch.tensor([tokenizer(f"{record['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                each = torch.log_softmax(loaded(input_ids=whole).logits[0, :-1], -1)
            row.append(each.gather(1, whole[0, 1:, None])[len(prompt) - 1 :].sum().item())
        found.append(row)
    return found


def test_a_run_its_adapter_and_the_merged_folder_score_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks, run = tmp_path / "tasks", BEFORE / "plain"
    tasks.mkdir()
    (tasks / "records.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    kwargs = {"data_files": {"validation": str(tasks / "records.jsonl")}}
    (tasks / "here.yaml").write_text(json.dumps({**TASK, "dataset_kwargs": kwargs}))
    consolidate(run / "checkpoint-3" / "adapter", BASE, tmp_path / "merged", dtype="fp32", progress=False)
    expected = log_probs(tmp_path / "merged")
    places = ((run, BASE), (run / "checkpoint-3" / "adapter", BASE), (tmp_path / "merged", None))
    for model, base in places:
        found = scored(model, tasks, base)
        for sample, row in zip(found["samples"]["here"], expected, strict=True):
            assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(row, abs=2e-4)
        right = [row.index(max(row)) == record["answer"] for row, record in zip(expected, RECORDS, strict=True)]
        assert found["results"]["here"]["acc,none"] == sum(right) / len(right)
    plain = scored(BASE, tasks)["samples"]["here"]
    assert [float(answer[0][0]) for answer in plain[0]["resps"]] != pytest.approx(expected[0], abs=1e-3)
