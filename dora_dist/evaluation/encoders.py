"""Models that label, rate, find answers or summarise, on files: the metrics that their training reports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.config import RunConfig
from dora_dist.runtime import console
from dora_dist.tasks import problems, task_named

if TYPE_CHECKING:
    from dora_dist.models.heads import Head


def evaluate_encoder(
    model_path: str | Path,
    head: Head,
    tasks: Mapping[str, str | Path],
    *,
    fields: Mapping[str, Any],
    batch_size: int = 8,
    num_beams: int | None = None,
    limit: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores on files of records, in one process: the result of `evaluation.evaluate` for such a model.

    `fields` are fields of the configuration's data section (text_fields, cutoff_len, ...). They, `num_beams` and
    `dtype` are by default those of the run, if `model_path` is a run folder, a checkpoint or a checkpoint's adapter;
    else the configuration's defaults, and fp32. Raises UserError for records that do not fit the task.
    """
    from dora_dist.evaluation.inference import load_for_inference, run_of

    run = run_of(str(model_path))
    model_fields, training_fields = run.get("model", {}), run.get("training", {})
    data = {**run.get("data", {}), **fields, "format": task_named(head.task).formats[0]}
    training = {
        "global_batch_size": batch_size,
        "micro_batch_size": batch_size,
        "num_beams": num_beams or training_fields.get("num_beams", 4),
    }
    model_of = {"path": str(model_path), "task": head.task, "num_labels": head.num_labels}
    configs = {name: _config(model_of, {**data, "train": str(file)}, training) for name, file in tasks.items()}
    dtype = dtype or model_fields.get("dtype", "fp32")
    started = time.perf_counter()
    model, tokenizer = load_for_inference(str(model_path), dtype, base)
    loaded = time.perf_counter()
    results = {}
    for name, config in configs.items():
        began = time.perf_counter()
        scores = score_records(model, tokenizer, config, name, limit=limit, progress=progress)
        results[name] = {"file": str(tasks[name]), **scores, "seconds": round(time.perf_counter() - began, 3)}
    return {
        "model": str(model_path),
        "task": head.task,
        "settings": {**training, "dtype": dtype, "limit": limit, "data": data},
        "tasks": results,
        "load_seconds": round(loaded - started, 3),
        "seconds": round(time.perf_counter() - loaded, 3),
    }


def _config(model: dict[str, Any], data: dict[str, Any], training: dict[str, Any]) -> RunConfig:
    """A run whose training data is what to evaluate on: all of it, and nothing else."""
    alone = {"validation": None, "validation_samples": 0}
    raw = {"model": model, "data": {**data, **alone}, "training": training}
    return RunConfig.from_dict(raw, origin="the evaluation", rules=problems)


def score_records(
    model: Any, tokenizer: Any, config: RunConfig, name: str, *, limit: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """The metrics of a model, in evaluation mode, on the records of `config.data.train`; and "total", their number.

    `name` is what the progress bar says; `limit`: only so many records, the first.
    """
    import torch

    from dora_dist.data import EpochBatches, EpochDataLoader, read, warn_of_the_whole

    task, data = task_named(config.model.task), config.data
    reader = task.reader(tokenizer, model=config.model, data=data)
    tokenized = read(reader, data, seed=config.training.seed, progress=progress)
    warn_of_the_whole(data, tokenized)
    dataset = tokenized.train
    if limit is not None:
        dataset = dataset.first(limit)
    aim = task.objective(tokenizer, model, data=data, training=config.training)
    size = config.training.micro_batch_size
    order = EpochBatches.in_order(len(dataset), micro_batch_size=size, world_size=1, rank=0)
    loader = EpochDataLoader(aim.with_filler(dataset), batch_sampler=order, collate_fn=aim.collator)
    device = next(model.parameters()).device

    def batches() -> Iterator[dict[str, Any]]:
        for batch in console.bars()(loader, desc=name, unit="batch", disable=not progress):
            yield {key: values.to(device) for key, values in batch.items()}

    with torch.no_grad():
        metrics = aim.evaluate(model, batches(), dataset, device)
    return {**metrics, "total": len(dataset.records.unique())}
