"""The words of a text that answer a question about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dora_dist.tasks.task import Task

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
    from dora_dist.data import Reader
    from dora_dist.models.heads import Head
    from dora_dist.tasks.objectives.base import Objective


class QuestionAnswering(Task):
    name = "question_answering"
    formats = ("squad",)
    fields = ("doc_stride",)

    def metrics(self, model: ModelConfig) -> tuple[str, ...]:
        return "f1", "exact_match"

    def problems(self, config: RunConfig) -> Iterator[str]:
        yield from super().problems(config)
        data = config.data
        if data.doc_stride >= data.longest_text // 2:
            yield (
                f"data.doc_stride = {data.doc_stride}: must be below half of data.cutoff_len = {data.longest_text}, or "
                "windows would hardly move on"
            )

    def head(self, model: ModelConfig) -> Head:
        from dora_dist.models.heads import QUESTION_ANSWERING

        return QUESTION_ANSWERING

    def reader(self, processor: Any, *, model: ModelConfig, data: DataConfig) -> Reader:
        from dora_dist.data.spans import SpanReader

        return SpanReader(data, processor)

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        from dora_dist.tasks.objectives.spans import SpanFinding

        return SpanFinding(processor, data.longest_text)
