"""The recipes of configs/, scaled down to a tiny model of their family by overrides alone."""

import json
from pathlib import Path
from typing import Any

from tests import encoders, llava, subtasks, summaries, toy
from tests.distributed.training_runs import CONFIGS, options

RECIPES = sorted(file.stem for file in CONFIGS.glob("*.json"))
STEPS, BATCH, RECORDS = 8, 8, 40
TOWERS = list(llava.TOWERS)
ENCODERS = list(encoders.FAMILIES)
_CUTOFF = {"llava": 256} | dict.fromkeys(("classification", "squad", "summarisation", "vision_text"), 48)
"""Tokens of a sample, by data.format: toys have few positions."""


def write_models(folder: Path) -> Path:
    """A tiny model of every family, by name: "llama", each of ENCODERS, "bart", "llava-" with each of TOWERS.

    Also what some records show: pictures of conversations, and VL-BART's features in "visual".
    """
    toy.base_model(folder / "llama")
    for family in ENCODERS:
        encoders.plain_encoder(folder / family, family)
        encoders.classifier(folder / f"{family}-classifier", family)
    summaries.base_model(folder / "bart")
    for tower in TOWERS:
        llava.model(folder / f"llava-{tower}", tower)
    llava.write(folder / "conversations", 10, 6)
    subtasks.features(folder / "visual", RECORDS + 1)  # a pair has the next picture, too
    return folder


def family(recipe: dict[str, Any]) -> str:
    """The name of the model that stands for a recipe's own."""
    kinds = {"causal_lm": "llama", "image_text_to_text": "llava-clip"}
    kinds |= dict.fromkeys(("seq2seq_lm", "vision_seq2seq_lm"), "bart")
    return kinds.get(recipe["model"].get("task", "causal_lm"), "roberta")


def scaled(name: str, models: Path, run_dir: Path, ranks: int, **fields: Any) -> dict[str, Any]:
    """An action of `tests.gpu.ranks`: the recipe with a small model, little data and few steps; `fields` come last."""
    recipe = json.loads((CONFIGS / f"{name}.json").read_text())
    format = recipe["data"].get("format", "instruction")
    data = _write_data(recipe, run_dir.with_name(f"{run_dir.name}-data.json"), models)
    small: dict[str, Any] = {
        "model.path": models / family(recipe),
        "data.train": data,
        "data.cutoff_len": _CUTOFF.get(format, 192),
        "training.max_steps": STEPS,
        "training.global_batch_size": max(BATCH, ranks),
        "training.micro_batch_size": 2,
        "checkpoint.run_dir": run_dir,
        "engine.reduce_bucket_size": 100_000,  # allocated whole in every run of the process
        "logging.every": 1,
        "logging.progress_bar": "false",
    }
    small |= {f"adapter.{name}": n for name, n in (("r", 4), ("lora_alpha", 8)) if name in recipe["adapter"]}
    if recipe["adapter"].get("dynamic_rank"):
        small["adapter.prune_every"] = 1
    if "warmup_steps" in recipe["training"]:
        small["training.warmup_steps"] = 2
    if "eval_every" in recipe["training"]:
        small["training.eval_every"] = small["checkpoint.save_every"] = STEPS // 2
    if "validation" in recipe["data"]:
        small["data.validation"] = data
    elif "validation_samples" in recipe["data"]:
        small["data.validation_samples"] = 4
    if format == "llava":
        small |= {"data.image_folder": models / "conversations" / "pictures"}
    if format == "vision_text":
        features = "videos" if set(recipe["data"]["train"]) <= set(subtasks.VIDEOS) else "pictures.h5"
        small |= {"data.features": models / "visual" / features, "data.target_len": 12}
        small |= {"model.feature_dim": subtasks.WIDTH, "data.num_workers": 0}
    small |= {"squad": {"data.doc_stride": 16}, "summarisation": {"data.target_len": 16}}.get(format, {})
    return {"do": "train", "recipe": name, "overrides": options(small | fields)}


def _write_data(recipe: dict[str, Any], path: Path, models: Path) -> Path | str:
    """Records as the recipe's format and fields have them; what data.train is to be."""
    data = recipe["data"]
    format = data.get("format", "instruction")
    if format == "vision_text":
        return json.dumps(subtasks.write(path.with_suffix(""), RECORDS, tuple(data["train"])))
    records: list[dict[str, Any]]
    if format == "classification":
        labels = recipe["model"]["num_labels"]
        rows = encoders.labelled(RECORDS, rating=labels == 1)
        texts = dict(zip(data["text_fields"], ("sentence1", "sentence2"), strict=False))
        records = [
            {**{field: row[text] for field, text in texts.items()}, data["label_field"]: row["label"]} for row in rows
        ]
    elif format == "squad":
        records = encoders.questions(RECORDS)
    elif format == "summarisation":
        records = summaries.records(RECORDS)
    elif format == "completion":
        records = [{"prompt": r["instruction"], "completion": f" {r['output']}"} for r in toy.records(RECORDS)]
    elif format == "llava":
        records = json.loads((models / "conversations" / "data.json").read_text())
        if data.get("chat_template") == "plain":  # one question about one picture
            records = [r for r in records if isinstance(r.get("image"), str) and len(r["conversations"]) == 2]
    else:
        records = list(toy.records(RECORDS))
    path.write_text(json.dumps(records))
    return path
