"""A language model: the next token of a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dora_dist.config.mixture import formats_of
from dora_dist.config.names import SPEAKERS
from dora_dist.config.templates import PromptTemplate
from dora_dist.tasks.task import STREAM, Task

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, TrainingConfig
    from dora_dist.data import Reader
    from dora_dist.models.heads import Head
    from dora_dist.tasks.evaluations.base import Evaluation, Settings, Subject
    from dora_dist.tasks.objectives.base import Objective
    from dora_dist.tasks.prompting.base import Prompting


CHATS = ("messages", "sharegpt")
TEMPLATE = "template"


class CausalLM(Task):
    name = "causal_lm"
    formats = ("instruction", "alpaca", "completion", *CHATS, TEMPLATE)
    fields = ("packing", "packing_length", "train_on", "prompt_template", "answer_field", *STREAM)
    trains_in_full = False

    def fields_of(self, data: DataConfig) -> tuple[str, ...]:
        return ("chat_template", *self.fields) if _formats(data) & {*CHATS} else self.fields

    def problems_of_data(self, data: DataConfig) -> Iterator[str]:
        yield from _template_problems(data)
        given, fields = data.chat_template, type(data).model_fields
        if _formats(data) & {*CHATS} and given not in ("model", fields["chat_template"].default):
            yield f'data.chat_template = "{given}": data.format = "{data.format}" takes the tokenizer\'s; give "model"'
        if data.train_on == fields["train_on"].default:
            return
        label = f"data.train_on = {json.dumps(data.train_on)}"
        if not _formats(data) & {*CHATS}:
            formats = " and ".join(CHATS)
            yield f'{label}: has no meaning for data.format = "{data.format}", only for {formats}; take it out'
        elif data.loss_on != "answer":
            yield f'{label}: data.loss_on = "all" learns every turn; set it to "answer"'
        for role in data.train_on:
            if role in SPEAKERS:
                yield f'{label}: "{role}" is called "{SPEAKERS[role]}" here; give that'

    def head(self, model: ModelConfig) -> Head:
        from dora_dist.models.heads import CAUSAL_LM

        return CAUSAL_LM

    def reader(self, processor: Any, *, model: ModelConfig, data: DataConfig) -> Reader:
        from dora_dist.data.texts import TextReader

        return TextReader(data, processor)

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        from dora_dist.tasks.objectives.language import LanguageModelling

        return LanguageModelling(processor, model, packs=data.packing, loss_chunk=training.loss_chunk)

    def evaluation(self, subject: Subject, settings: Settings) -> Evaluation:
        from dora_dist.tasks.evaluations.language import LanguageEvaluation

        return LanguageEvaluation(self.name, subject, settings)

    def prompting(self, subject: Subject, *, format: str | None, chat_template: str | None) -> Prompting:
        from dora_dist.runtime.errors import UserError
        from dora_dist.tasks.prompting.texts import TextPrompting

        if chat_template not in (None, "model"):
            raise UserError(f"--chat-template {chat_template}: is for a LLaVA; leave it out")
        return TextPrompting(subject, format)


def _formats(data: DataConfig) -> set[str]:
    return formats_of(data.train, data.format)


def _template_problems(data: DataConfig) -> Iterator[str]:
    given, own = data.prompt_template, TEMPLATE in _formats(data)
    label = f"data.prompt_template = {json.dumps(given)}"
    if own and given is None:
        example = '"Question: {question}\\nAnswer: "'
        yield f'data.format = "{TEMPLATE}": data.prompt_template is not set; give one, such as {example}'
    elif not own and (given is not None or data.answer_field != type(data).model_fields["answer_field"].default):
        said = label if given is not None else f'data.answer_field = "{data.answer_field}"'
        yield f'{said}: has no meaning for data.format = "{data.format}", only for {TEMPLATE}; set data.format to it'
    elif given is not None:
        try:
            fields = PromptTemplate.of(given).fields
        except ValueError as error:
            yield f"{label}: {error}"
            return
        if not fields:
            yield f"{label}: names no field of a record; write {{question}} where the field question belongs"
        if data.answer_field in fields:
            yield (
                f"{label}: holds the answer, {{{data.answer_field}}} (data.answer_field); it follows the prompt by "
                "itself, so take it out"
            )
