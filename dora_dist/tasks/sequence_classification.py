"""A label for a text or for two, or a rating."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dora_dist.tasks.task import STREAM, Task

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, TrainingConfig
    from dora_dist.data import Reader
    from dora_dist.models.heads import Head
    from dora_dist.tasks.objectives.base import Objective


class SequenceClassification(Task):
    name = "sequence_classification"
    formats = ("classification",)
    fields = ("text_fields", "label_field", *STREAM)
    packages = ("sklearn", "scipy")

    def metrics(self, model: ModelConfig) -> tuple[str, ...]:
        if model.num_labels == 1:
            return "pearson", "spearman"
        return "accuracy", "matthews", *(["f1"] if model.num_labels == 2 else [])

    def words(self, model: ModelConfig) -> str:
        return f"{super().words(model)} with model.num_labels = {model.num_labels}"

    def head(self, model: ModelConfig) -> Head:
        from dora_dist.models.heads import SEQUENCE_CLASSIFICATION

        return SEQUENCE_CLASSIFICATION.with_labels(model.num_labels)

    def reader(self, processor: Any, *, model: ModelConfig, data: DataConfig) -> Reader:
        from dora_dist.data.labelled import LabelledReader

        return LabelledReader(data, processor, model.num_labels)

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        from dora_dist.models.heads import SEQUENCE_CLASSIFICATION
        from dora_dist.tasks.objectives.labels import Labelling

        SEQUENCE_CLASSIFICATION.fit(model, processor)
        return Labelling(processor, model.config.num_labels)
