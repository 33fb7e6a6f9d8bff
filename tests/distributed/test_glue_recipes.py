"""The GLUE recipes, scaled down, on real weights and real text: BERT-tiny learns what people think of films."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.checkpoint import run_folder
from tests import real
from tests.distributed.training_runs import options, train_recipes
from tests.ranks import run_ranks

TRAIN, HELD_OUT = 2400, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    records = real.rated_snippets()
    assert len(records) == 10605
    clear = [{**r, "label": int(r["rating"] > 0)} for r in records if abs(r["rating"]) > 1]
    for name, rows in (("sst2", clear), ("stsb", records)):
        (folder / f"{name}-validation.json").write_text(json.dumps(rows[:HELD_OUT]))
        (folder / f"{name}-train.json").write_text(json.dumps(rows[HELD_OUT : HELD_OUT + TRAIN]))
    return folder


def overrides(base: Path, folder: Path, name: str, **fields: Any) -> list[str]:
    """What makes a recipe small: the model, the data, 2 passes in batches of 32, evaluation after each."""
    small = {
        "model.path": base,
        "data.train": folder / f"{name}-train.json",
        "data.validation": folder / f"{name}-validation.json",
        "data.text_fields": "sentence",
        "data.cutoff_len": 48,
        "training.epochs": 2,
        "training.global_batch_size": 32,
        "training.micro_batch_size": 16,
        "training.eval_every": 75,
        "checkpoint.run_dir": folder / name,
        "logging.progress_bar": "false",
        **fields,
    }
    return options(small)


def test_recipes_scaled_down_learn_from_real_text(folder: Path) -> None:
    base = real.bert_tiny(folder / "base")
    faster = {"training.learning_rate": 2e-3}
    rating = {"data.label_field": "rating"}
    recipes = {
        "glue_sst2": overrides(base, folder, "sst2", **faster),
        "glue_stsb": overrides(base, folder, "stsb", **rating),
    }
    run_ranks(train_recipes, 2, recipes)
    assert best(folder / "sst2", "eval_accuracy") > 0.68
    assert best(folder / "stsb", "eval_pearson") > 0.5
    records = json.loads((folder / "sst2-validation.json").read_text())
    right = [int(label == record["label"]) for label, record in zip(merged_labels(folder, base), records, strict=True)]
    assert sum(right) / len(right) == pytest.approx(best(folder / "sst2", "eval_accuracy"), abs=1 / HELD_OUT)


def merged_labels(folder: Path, base: Path) -> list[int]:
    """What transformers alone makes of the best checkpoint, consolidated, on the held-out sentences."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from dora_dist.checkpoint.adapter_folders import find_adapter
    from dora_dist.checkpoint.consolidate import consolidate

    consolidate(find_adapter(folder / "sst2")[0], base, folder / "merged", progress=False)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "merged")
    texts = [record["sentence"] for record in json.loads((folder / "sst2-validation.json").read_text())]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.argmax(1).tolist()


def best(run_dir: Path, metric: str) -> float:
    """The best checkpoint's metric, which is that of the whole held-out set."""
    value = json.loads((run_dir / "best.json").read_text())[metric]
    lines = run_folder.metrics(run_dir)
    assert value == max(line[metric] for line in lines if metric in line)
    return float(value)
