"""The evaluation of a task that has none of its own: the metrics of its training, on other records of the same kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_dist.config import DataConfig
from dora_dist.data import EpochBatches, EpochDataLoader, read, warn_of_the_whole
from dora_dist.runtime import console
from dora_dist.runtime.console import warn
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.base import Asked, Evaluation, Settings, Subject

if TYPE_CHECKING:
    from dora_dist.config import RunConfig
    from dora_dist.tasks.task import Task

FIELDS = ("text_fields", "label_field", "cutoff_len", "doc_stride", "target_len", "bad_images")
"""Of the configuration's data section."""


class RecordsEvaluation(Evaluation):
    """Fields of the data section, `num_beams` and `dtype` are by default those of the run in which the model was
    trained, else the configuration's defaults, and fp32.
    """

    def __init__(self, task: Task, subject: Subject, settings: Settings) -> None:
        settings.refuse_loss(task.name)
        settings.refuse_all_but((*FIELDS, *task.fields, *task.searching), task.name)
        self._task, self._subject, self._limit = task, subject, settings.limit
        run = {name: subject.run.get(name, {}) for name in ("model", "data", "training")}
        fields = dict(settings.fields or {})
        if settings.max_new_tokens is not None:
            fields["target_len"] = settings.max_new_tokens
        format = run["data"].get("format")
        format = format if format in task.formats else task.formats[0]
        self._data = {**run["data"], **fields, "format": format}
        self._training = {
            "global_batch_size": settings.batch_size,
            "micro_batch_size": settings.batch_size,
            "num_beams": settings.num_beams or run["training"].get("num_beams", 4),
        }
        self.dtype = settings.dtype or run["model"].get("dtype", "fp32")
        self.facts = {"task": task.name}
        self.settings = {**self._training, "dtype": self.dtype, "limit": self._limit, "data": self._data}

    def read(self, name: str, file: str) -> Asked:
        """The records themselves are read when they are scored."""
        head = self._subject.head
        raw = {
            "model": {
                "path": self._subject.path,
                "tokenizer": str(self._subject.tokenizer_source),
                "task": head.task,
                "num_labels": head.num_labels,
            },
            # A run whose training data is what to evaluate on: all of it, and nothing else.
            "data": {
                **self._data,
                "train": self._task.sources(name, file),
                "validation": None,
                "validation_samples": 0,
                "streaming": False,
                "shuffle_buffer": DataConfig.model_fields["shuffle_buffer"].default,
                "bad_records": "error",  # all that is there is measured
            },
            "training": self._training,
        }
        config = self._subject.configuration(raw)
        return _Records(self._task, config, name, subject=self._subject, limit=self._limit)


class _Records(Asked):
    def __init__(self, task: Task, config: RunConfig, name: str, *, subject: Subject, limit: int | None) -> None:
        self._task, self._config, self._name, self._subject, self._limit = task, config, name, subject, limit

    def score(self, model: Any, *, progress: bool) -> dict[str, Any]:
        config, task = self._config, self._task
        processor = task.processor(self._subject.base, config.model, config.data)
        reader = task.reader(processor, model=config.model, data=config.data)
        data = read(reader, config.data, seed=config.training.seed, progress=progress)
        warn_of_the_whole(config.data, data)
        dataset = data.train
        if self._limit is not None:
            dataset = dataset.first(self._limit)
        dataset.check_model(model)
        aim = task.objective(processor, model, data=config.data, training=config.training)
        size = config.training.micro_batch_size
        order = EpochBatches.in_order(len(dataset), micro_batch_size=size, world_size=1, rank=0)
        loader = EpochDataLoader(aim.with_filler(dataset), batch_sampler=order, collate_fn=aim.collator)
        device = next(model.parameters()).device
        with torch.no_grad():
            metrics = aim.evaluate(model, _on(loader, device, self._name, progress), dataset, device)
        left_out = _settled(aim.problems, config.data.bad_images, self._name)
        return {**metrics, "total": len(dataset.records.unique()) - left_out}


def _settled(problems: list[str], what_to_do: str, name: str) -> int:
    """How many records could not be read, which is warned of, or with data.bad_images = "error" is a UserError."""
    if not problems:
        return 0
    first = f"{problems[0]} ({len(problems):,} of {name} cannot be read in all)"
    if what_to_do == "error":
        raise UserError(f"{first}; fix it, or leave such records out with --bad-images skip")
    warn(f"left out: {first}")
    return len(problems)


def _on(loader: Any, device: torch.device, name: str, progress: bool) -> Iterator[dict[str, Any]]:
    for batch in console.bars()(loader, desc=name, unit="batch", disable=not progress):
        yield {key: values.to(device) if isinstance(values, Tensor) else values for key, values in batch.items()}
