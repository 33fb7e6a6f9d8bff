"""A language model: the next token of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dora_dist.tasks.task import Task

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, TrainingConfig
    from dora_dist.models.heads import Head
    from dora_dist.tasks.objectives.base import Objective


class CausalLM(Task):
    name = "causal_lm"
    formats = ("instruction", "alpaca", "completion", "messages")

    def head(self, model: ModelConfig) -> Head:
        from dora_dist.models.heads import CAUSAL_LM

        return CAUSAL_LM

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        from dora_dist.tasks.objectives.language import LanguageModelling

        return LanguageModelling(processor)
