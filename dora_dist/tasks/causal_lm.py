"""A language model: the next token of a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dora_dist.tasks.task import Task

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, TrainingConfig
    from dora_dist.data import Reader
    from dora_dist.models.heads import Head
    from dora_dist.tasks.evaluations.base import Evaluation, Settings, Subject
    from dora_dist.tasks.objectives.base import Objective
    from dora_dist.tasks.prompting.base import Prompting


CHAT = "messages"


class CausalLM(Task):
    name = "causal_lm"
    formats = ("instruction", "alpaca", "completion", CHAT)
    trains_in_full = False

    def fields_of(self, data: DataConfig) -> tuple[str, ...]:
        return ("chat_template",) if data.format == CHAT else ()

    def problems_of_data(self, data: DataConfig) -> Iterator[str]:
        given = data.chat_template
        if data.format == CHAT and given not in ("model", type(data).model_fields["chat_template"].default):
            yield f'data.chat_template = "{given}": data.format = "{CHAT}" takes the tokenizer\'s; give "model"'

    def head(self, model: ModelConfig) -> Head:
        from dora_dist.models.heads import CAUSAL_LM

        return CAUSAL_LM

    def reader(self, processor: Any, *, model: ModelConfig, data: DataConfig) -> Reader:
        from dora_dist.data.texts import TextReader

        return TextReader(data, processor)

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        from dora_dist.tasks.objectives.language import LanguageModelling

        return LanguageModelling(processor)

    def evaluation(self, subject: Subject, settings: Settings) -> Evaluation:
        from dora_dist.tasks.evaluations.language import LanguageEvaluation

        return LanguageEvaluation(self.name, subject, settings)

    def prompting(self, subject: Subject, *, format: str | None, chat_template: str | None) -> Prompting:
        from dora_dist.runtime.errors import UserError
        from dora_dist.tasks.prompting.texts import TextPrompting

        if chat_template not in (None, "model"):
            raise UserError(f"--chat-template {chat_template}: is for a LLaVA; leave it out")
        return TextPrompting(subject, format)
