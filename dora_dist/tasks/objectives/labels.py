"""One label for a text, or a rating."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.data import IGNORED, LabelledCollator, labelled_filler
from dora_dist.metrics.glue import classification_metrics, rating_metrics
from dora_dist.tasks.objectives.base import PAD_TO_MULTIPLE_OF, Batch, Objective, everyones


class Labelling(Objective):
    """Cross entropy per sample over `num_labels` labels, or the squared error where that is 1 (a rating)."""

    def __init__(self, tokenizer: Any, num_labels: int) -> None:
        super().__init__()
        self.rating = num_labels == 1
        self.collator = LabelledCollator(tokenizer, self.rating, PAD_TO_MULTIPLE_OF)
        self.filler = labelled_filler(tokenizer.pad_token_id)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int = 1) -> Tensor:
        # The models' own losses are means over rows, fillers among them: they would depend on the world size.
        return _losses(outputs.logits, labels, self.rating) / num_items_in_batch

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        found, expected = [], []
        for batch in batches:
            expected.append(batch.pop("labels").double())
            found.append(model(**batch).logits.double())
        logits, labels = (everyones(part)[: len(dataset)] for part in (found, expected))
        loss = float(_losses(logits, labels, self.rating) / len(dataset))
        metrics = rating_metrics(logits[:, 0], labels) if self.rating else classification_metrics(logits, labels)
        return {"loss": loss, **metrics}


def _losses(logits: Tensor, labels: Tensor, rating: bool) -> Tensor:
    """The sum over rows that have a label; logits (rows, num_labels), labels (rows,)."""
    if not rating:
        return F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED, reduction="sum")
    valid = labels != IGNORED
    return ((logits[:, 0].float() - labels.float()).square() * valid).sum()
