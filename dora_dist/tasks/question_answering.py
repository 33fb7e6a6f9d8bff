"""The words of a text that answer a question about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dora_dist.tasks.task import Task

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, TrainingConfig
    from dora_dist.models.heads import Head
    from dora_dist.tasks.objectives.base import Objective


class QuestionAnswering(Task):
    name = "question_answering"
    formats = ("squad",)

    def head(self, model: ModelConfig) -> Head:
        from dora_dist.models.heads import QUESTION_ANSWERING

        return QUESTION_ANSWERING

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        from dora_dist.tasks.objectives.spans import SpanFinding

        return SpanFinding(processor, data.cutoff_len)
