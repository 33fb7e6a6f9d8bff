"""An encoder-decoder model that reads a text and visual features (VL-BART), for several tasks at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dora_dist.config.names import by_task
from dora_dist.runtime import extras
from dora_dist.runtime.console import warn
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.task import Task

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
    from dora_dist.data import Reader, TokenizedData
    from dora_dist.models.heads import Head
    from dora_dist.tasks.objectives.base import Objective


_NUMBER = "one for each task, or a number for all"
_EACH = {
    "features": "an HDF5 file, a folder of .h5 or a folder of .npz files, or one for each task "
    "(`dora-dist extract-features` makes them)",
    "cutoff_len": _NUMBER,
    "target_len": _NUMBER,
}
"""Fields that hold one value for all tasks, or one for each; and what to give."""


class VisionSeq2SeqLM(Task):
    name = "vision_seq2seq_lm"
    formats = ("vision_text",)
    fields = ("features", "prompts", "target_len")
    searching = ("num_beams", "max_new_tokens")
    several = True

    def metrics(self, model: ModelConfig) -> tuple[str, ...]:
        from dora_dist.data.subtasks import SUBTASKS, metrics_of

        return ("average", *metrics_of(SUBTASKS))

    def problems(self, config: RunConfig) -> Iterator[str]:
        from dora_dist.data.subtasks import SUBTASKS, metrics_of

        yield from super().problems(config)
        data, metric = config.data, config.training.metric
        named = by_task(data.validation) or (by_task(data.train) if data.validation_samples else {})
        measured = [name for name in named if name in SUBTASKS]
        packages = {package for name in measured for package in SUBTASKS[name].packages}
        if (remedy := extras.missing(*sorted(packages))) is not None:
            yield f"data.validation: scoring captions {remedy}"
        known = metrics_of(measured)
        if metric in self.metrics(config.model) and metric not in ("average", *known):
            yield f'training.metric = "{metric}": the run is not validated on that task; use {", ".join(known)}'

    def problems_of_data(self, data: DataConfig) -> Iterator[str]:
        from dora_dist.data.subtasks import SUBTASKS

        names = ", ".join(map(json.dumps, SUBTASKS))
        for field in ("train", "validation"):
            sources = getattr(data, field)
            if sources is not None and not by_task(sources):
                yield (
                    f"data.{field} = {json.dumps(sources)}: say which task each file is of, such as "
                    f'{{"vqa": {json.dumps(sources)}}} (tasks: {names})'
                )
        for field in ("train", "validation", "prompts", *_EACH):
            value = getattr(data, field)
            for name in set(value if isinstance(value, dict) else ()) - set(SUBTASKS):
                yield f'data.{field}: "{name}" is not a task of vision_text records; use {names}'
        needed = dict.fromkeys([*by_task(data.train), *by_task(data.validation)])
        for field, remedy in _EACH.items():
            value = getattr(data, field)
            without = [name for name in needed if name not in value] if isinstance(value, dict) else []
            if value is None or without:
                missing = "is not set" if value is None else f"has none for {', '.join(without)}"
                yield f"data.{field} {missing}; give {remedy}"

    def sources(self, name: str, file: str) -> Any:
        return {name: file}

    def head(self, model: ModelConfig) -> Head:
        from dora_dist.models.heads import VISION_SEQ2SEQ_LM

        return VISION_SEQ2SEQ_LM.with_features(model.feature_dim)

    def reader(self, processor: Any, *, model: ModelConfig, data: DataConfig) -> Reader:
        from dora_dist.data import VisionReader

        return VisionReader(data, processor, model.feature_dim)

    def check_sets(self, data: TokenizedData, training: TrainingConfig) -> None:
        """A task of the training set may have no sample in the validation set, where that was held out by chance."""
        if data.validation is None or not training.eval_every:
            return
        from dora_dist.data.subtasks import metrics_of

        measured = data.validation.parts
        known = metrics_of(measured)
        if training.metric not in ("loss", "average", *known):
            raise UserError(
                f'training.metric = "{training.metric}": no validation sample is of that task; hold out more with '
                f"data.validation_samples, name its files in data.validation, or use {', '.join(known)}"
            )
        if without := [name for name in data.train.parts if name not in measured]:
            warn(
                f"no validation sample is of {', '.join(without)}, so nothing is measured of it, and the average is "
                "that of the other tasks; hold out more with data.validation_samples, or name files in data.validation"
            )

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        from dora_dist.tasks.objectives.vision import VisionWriting

        target_len, beams = data.longest_target, training.num_beams
        return VisionWriting(processor, model, target_len, beams, loss_chunk=training.loss_chunk)
