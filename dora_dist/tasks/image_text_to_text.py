"""A language model that sees pictures (LLaVA): the next token of a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.tasks.task import Task

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, TrainingConfig
    from dora_dist.data import Reader
    from dora_dist.models.heads import Head
    from dora_dist.tasks.evaluations.base import Evaluation, Settings, Subject
    from dora_dist.tasks.objectives.base import Objective
    from dora_dist.tasks.prompting.base import Prompting


class ImageTextToText(Task):
    name = "image_text_to_text"
    formats = ("llava",)
    fields = ("image_folder", "chat_template", "packing", "packing_length")
    packages = ("PIL",)

    def problems_of_data(self, data: DataConfig) -> Iterator[str]:
        if data.image_folder is None:
            remedy = "give the folder that the pictures are in"
            yield f'data.format = "{data.format}": data.image_folder is not set; {remedy}'
        if data.loss_on != "answer":
            yield (
                f'data.loss_on = "{data.loss_on}": of conversations with pictures only the assistant\'s turns are '
                'learnt; set it to "answer"'
            )

    def head(self, model: ModelConfig) -> Head:
        from dora_dist.models.heads import IMAGE_TEXT_TO_TEXT

        return IMAGE_TEXT_TO_TEXT

    def processor(self, base: Path, model: ModelConfig, data: DataConfig) -> Any:
        """A PictureProcessor."""
        from dora_dist.models.families import load_processor

        return load_processor(base, data, model.tokenizer)

    def tokenizer(self, processor: Any) -> Any:
        return processor.tokenizer

    def files(self, processor: Any, base: Path) -> dict[str, bytes]:
        from dora_dist.models.tokenizer import files_of

        return files_of(processor.tokenizer, base)

    def reader(self, processor: Any, *, model: ModelConfig, data: DataConfig) -> Reader:
        from dora_dist.data.pictured import ConversationReader

        return ConversationReader(data, processor)

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        from dora_dist.tasks.objectives.language import PictureModelling

        return PictureModelling(processor, model, packs=data.packing, loss_chunk=training.loss_chunk)

    def evaluation(self, subject: Subject, settings: Settings) -> Evaluation:
        from dora_dist.tasks.evaluations.pictures import PicturesEvaluation

        return PicturesEvaluation(self.name, subject, settings)

    def prompting(self, subject: Subject, *, format: str | None, chat_template: str | None) -> Prompting:
        from dora_dist.runtime.errors import UserError
        from dora_dist.tasks.prompting.pictures import PicturePrompting

        if format not in (None, *self.formats):
            raise UserError(f"--format {format}: a LLaVA has conversations, under --chat-template; leave it out")
        return PicturePrompting(self.name, subject, chat_template)
