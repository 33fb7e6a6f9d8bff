"""A text written by an encoder-decoder model after it has read another and visual features, for several tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.data import IGNORED, VisionCollator
from dora_dist.data.subtasks import scores_of
from dora_dist.models.chunked_loss import Rows
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.objectives.base import Batch, add_up
from dora_dist.tasks.objectives.summaries import Summarising


class VisionWriting(Summarising):
    """The mean over samples of score × cross entropy per token of the target (Liu et al., section 5.3).

    A batch's mean is over its samples, whatever their lengths and scores; each task's own metrics, and their average.
    Samples that cannot be read count in neither.
    """

    inputs = (
        *Summarising.inputs,
        "visual_features",
        "visual_boxes",
        "visual_images",
        "visual_objects",
        "visual_mask",
    )
    exact = (
        "scores",
        "token_weights",
        "visual_boxes",
    )  # bf16 has three digits, and an area is a product of differences

    def __init__(self, tokenizer: Any, model: Any, target_len: int, num_beams: int, *, loss_chunk: Rows = 0) -> None:
        super().__init__(tokenizer, model, target_len, num_beams, loss_chunk=loss_chunk)
        self.collator = VisionCollator(self.collator, model.config.feature_dim)
        self._scores: Tensor | None = None  # of the batch that the next loss is of

    def prepared(self, batch: Batch) -> Batch:
        self.problems += batch.pop("problems", [])
        self._scores = batch.pop("scores")
        if self._in_chunks:
            labels = batch["labels"]
            each = self._scores / (labels != IGNORED).sum(1).clamp(min=1)
            batch["token_weights"] = each[:, None].expand(labels.shape)
        return super().prepared(batch)

    def counted(self, batch: Batch) -> Batch:
        """Samples: each has a first label."""
        return {"labels": batch["labels"][:, 0]}

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int = 1) -> Tensor:
        assert self._scores is not None
        if outputs.logits is None:  # taken in chunks, with the scores in it
            return outputs.loss / num_items_in_batch
        # In training the scores are the loader's, from before the batch went to the device.
        scores = self._scores.to(labels.device, non_blocking=True)
        return (_means(outputs.logits, labels) * scores).sum() / num_items_in_batch

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        def losses(outputs: Any, labels: Tensor) -> Tensor:
            return torch.stack([self.loss(outputs, labels).double(), (labels[:, 0] != IGNORED).sum().double()])

        texts, read, total = self._written(model, batches, dataset, losses, device=device)
        add_up(total)
        wanted = dataset.references
        answered = [(*each, text) for each, text, there in zip(wanted, texts, read, strict=True) if there]
        for subtask in dict.fromkeys(subtask for subtask, _ in wanted):
            if subtask not in {subtask for subtask, *_ in answered}:
                such_as = f" ({self.problems[0]})" if self.problems else ""  # a rank of several may have met none
                raise UserError(
                    f"data.features: those of all samples of {subtask} to evaluate on cannot be read{such_as}; extract "
                    "them again"
                )
        subtasks, references, answers = zip(*answered, strict=True)
        return {"loss": float(total[0] / total[1]), **scores_of(subtasks, answers, references)}


def _means(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows,) fp32: the mean over a row's labelled tokens, 0 where it has none; logits (rows, length, vocabulary)."""
    flat = logits.float().flatten(0, 1), labels.flatten()  # a view: logits in fp32 are the largest tensor of a step
    losses = F.cross_entropy(*flat, ignore_index=IGNORED, reduction="none").view_as(labels)
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
