"""A text written by an encoder-decoder model after it has read another and visual features, for several tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.data import IGNORED, Collator, VisionCollator
from dora_dist.data.subtasks import scores_of
from dora_dist.tasks.objectives.base import PAD_TO_MULTIPLE_OF, Batch, add_up
from dora_dist.tasks.objectives.summaries import Summarising


class VisionWriting(Summarising):
    """The mean over samples of score × cross entropy per token of the target (Liu et al., section 5.3).

    A batch's mean is over its samples, whatever their lengths and scores; each task's own metrics, and their average.
    """

    inputs = (
        *Summarising.inputs,
        "visual_features",
        "visual_boxes",
        "visual_images",
        "visual_objects",
        "visual_mask",
    )

    def __init__(self, tokenizer: Any, model: Any, target_len: int, num_beams: int) -> None:
        super().__init__(tokenizer, model, target_len, num_beams)
        # Loader processes get the collator, and a model's hooks cannot be handed to all kinds of processes.
        self.collator = VisionCollator(
            Collator(tokenizer.pad_token_id, pad_to_multiple_of=PAD_TO_MULTIPLE_OF), model.config.feature_dim
        )
        self._decoder_input = model.prepare_decoder_input_ids_from_labels
        self._scores: Tensor | None = None  # of the batch that the next loss is of

    def prepared(self, batch: Batch) -> Batch:
        self.problems += batch.pop("problems", [])
        self._scores = batch.pop("scores")
        return {**batch, "decoder_input_ids": self._decoder_input(labels=batch["labels"])}

    def counted(self, batch: Batch) -> Batch:
        """Samples: each has a first label."""
        return {"labels": batch["labels"][:, 0]}

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int = 1) -> Tensor:
        assert self._scores is not None
        # In training the scores are the loader's, from before the batch went to the device.
        scores = self._scores.to(labels.device, non_blocking=True)
        return (_means(outputs.logits, labels) * scores).sum() / num_items_in_batch

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        def losses(outputs: Any, labels: Tensor) -> Tensor:
            return torch.stack([self.loss(outputs, labels).double(), (labels[:, 0] != IGNORED).sum().double()])

        texts, total = self._written(model, batches, dataset, losses, device=device)
        add_up(total)
        subtasks, references = zip(*dataset.references, strict=True)
        return {"loss": float(total[0] / total[1]), **scores_of(subtasks, texts, references)}


def _means(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows,) fp32: the mean over a row's labelled tokens, 0 where it has none; logits (rows, length, vocabulary)."""
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
