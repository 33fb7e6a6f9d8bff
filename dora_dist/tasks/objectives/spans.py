"""The span of a text that answers a question."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.data import IGNORED, LabelledCollator, labelled_filler
from dora_dist.metrics.squad import predict, squad_metrics
from dora_dist.tasks.objectives.base import PAD_TO_MULTIPLE_OF, Batch, Objective, add_up, everyones

_IMPOSSIBLE = -1e4
"""A logit whose exponential is 0; finite, so that sums of it are."""


class SpanFinding(Objective):
    """Cross entropy of the answer's first and of its last token, averaged."""

    def __init__(self, tokenizer: Any, cutoff_len: int) -> None:
        super().__init__()
        self.collator = LabelledCollator(tokenizer, False, PAD_TO_MULTIPLE_OF)
        self.filler = labelled_filler(tokenizer.pad_token_id, labels=2)
        self.longest = -(-cutoff_len // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        self._mask: Tensor | None = None  # of the batch that the next loss is of

    def prepared(self, batch: Batch) -> Batch:
        self._mask = batch["attention_mask"]
        return batch

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int = 1) -> Tensor:
        assert self._mask is not None
        return _losses(_logits(outputs, self._mask), labels) / num_items_in_batch

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        found, total = [], torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            labels = batch.pop("labels")
            logits = _logits(model(**batch), batch["attention_mask"])
            total[0] += _losses(logits, labels)
            total[1] += (labels != IGNORED).sum()
            found.append(F.pad(logits, (0, 0, 0, self.longest - logits.shape[1]), value=_IMPOSSIBLE))
        add_up(total)
        logits = everyones(found)[: len(dataset)].cpu()
        asked = dataset.references
        answers = predict(asked.questions, asked.windows, logits)
        return {"loss": float(total[0] / total[1]), **squad_metrics(asked.questions, answers)}


def _logits(outputs: Any, mask: Tensor) -> Tensor:
    """(rows, length, 2), fp32. Padding is impossible: how much there is would make the loss depend on the batch."""
    logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=2).float()
    # In training the mask is the loader's, from before the batch went to the device.
    padding = mask.to(logits.device, non_blocking=True)[..., None] == 0
    return logits.masked_fill(padding, _IMPOSSIBLE)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over both ends; labels (rows, 2)."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
