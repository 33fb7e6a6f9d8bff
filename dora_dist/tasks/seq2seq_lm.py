"""An encoder-decoder model: a summary of a document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dora_dist.tasks.task import STREAM, Task

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
    from dora_dist.data import Reader
    from dora_dist.models.heads import Head
    from dora_dist.tasks.objectives.base import Objective


class Seq2SeqLM(Task):
    name = "seq2seq_lm"
    formats = ("summarisation",)
    fields = ("text_fields", "label_field", "target_len", *STREAM)
    searching = ("num_beams", "max_new_tokens")
    packages = ("rouge_score",)
    trains_in_full = False

    def metrics(self, model: ModelConfig) -> tuple[str, ...]:
        return "rouge1", "rouge2", "rougeL"

    def problems(self, config: RunConfig) -> Iterator[str]:
        yield from super().problems(config)
        if len(config.data.text_fields) > 1:
            yield f"data.text_fields = {json.dumps(config.data.text_fields)}: a document is one field; name one"

    def head(self, model: ModelConfig) -> Head:
        from dora_dist.models.heads import SEQ2SEQ_LM

        return SEQ2SEQ_LM

    def reader(self, processor: Any, *, model: ModelConfig, data: DataConfig) -> Reader:
        from dora_dist.data.summaries import SummaryReader

        return SummaryReader(data, processor)

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        from dora_dist.tasks.objectives.summaries import Summarising

        target_len, beams = data.longest_target, training.num_beams
        return Summarising(processor, model, target_len, beams, loss_chunk=training.loss_chunk)
