"""The next token of a text, and of a text with pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.data import IGNORED, Collator, PictureCollator, RowCollator, text_filler
from dora_dist.data.pictures import PictureProcessor
from dora_dist.models.chunked_loss import Rows, take_losses_in_chunks
from dora_dist.tasks.objectives.base import PAD_TO_MULTIPLE_OF, Batch, Objective, add_up
from dora_dist.tasks.objectives.rows import apart, tokens


class LanguageModelling(Objective):
    """Cross entropy per valid token, for a `model` of transformers.

    packs: of rows with several samples each. loss_chunk: as training.loss_chunk says.
    """

    def __init__(self, tokenizer: Any, model: Any, *, packs: bool = False, loss_chunk: Rows = 0) -> None:
        super().__init__()
        self._model, self.packs = model, packs
        self._in_chunks = take_losses_in_chunks(model, loss_chunk)
        samples = self._samples(tokenizer.pad_token_id)
        self.collator = RowCollator(samples) if self.packs else samples
        self.filler = text_filler(tokenizer.pad_token_id)

    def _samples(self, pad_token_id: int) -> Collator:
        return Collator(pad_token_id, pad_to_multiple_of=PAD_TO_MULTIPLE_OF)

    def prepared(self, batch: Batch) -> Batch:
        found = labelled_positions(batch)
        return {**found, "targets": found["shift_labels"]} if self._in_chunks else found

    def placed(self, batch: Batch) -> Batch:
        return apart(batch, self._model) if self.packs else batch

    def tokens(self, batch: Batch) -> int:
        return tokens(batch) if self.packs else super().tokens(batch)

    @torch.no_grad()
    def row_losses(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor] | None:
        logits, labels = outputs.get("logits"), batch["shift_labels"]
        learnt = labels != IGNORED
        if logits is None:
            each = outputs.get("token_losses")  # of a loss in chunks; another model may say nothing
            if each is None:
                return None
            return (each, learnt.long()) if self.packs else (each.sum(1), learnt.sum(1))
        # Row by row: in fp32 the logits of all would be the largest tensor of the step.
        pairs, how = zip(logits, labels, strict=True), "none" if self.packs else "sum"
        sums = [nn.functional.cross_entropy(a.float(), b, ignore_index=IGNORED, reduction=how) for a, b in pairs]
        return torch.stack(sums), learnt.long() if self.packs else learnt.sum(1)

    def sources(self, sources: Tensor, batch: Batch) -> Tensor:
        if not self.packs:
            return sources
        following = nn.functional.pad(sources[:, 1:], (0, 1), value=-1)  # a place is of the token that it predicts
        return following[:, batch["logits_to_keep"]]

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            batch = self.prepared(batch)
            # num_items_in_batch=1 makes the model return the SUM of its tokens' losses.
            total[0] += model(**batch, num_items_in_batch=1).loss.double()
            total[1] += (batch["shift_labels"] != IGNORED).sum()
        add_up(total)
        return {"loss": float(total[0] / total[1])}


def labelled_positions(batch: Batch) -> Batch:
    """Have the model compute logits only at positions where some row has a label.

    With a loss on answers alone that is a quarter of them or less, and logits are the largest activation. Labels are
    (batch, length) token ids, IGNORED where nothing is predicted; "shift_labels" are those of the next token at the
    positions kept (batch, kept), which "logits_to_keep" lists.
    """
    following = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    kept = (following != IGNORED).any(0).nonzero()[:, 0]
    if not len(kept):  # a batch of fillers: one position without a label, so that every rank runs every module
        kept = kept.new_zeros(1)
    return {**batch, "shift_labels": following[:, kept], "logits_to_keep": kept}


class PictureModelling(LanguageModelling):
    """Cross entropy per learnt token of texts with pictures; `problems` collects pictures that cannot be read."""

    def __init__(self, processor: PictureProcessor, model: Any, *, packs: bool = False, loss_chunk: Rows = 0) -> None:
        self._size = processor.size
        super().__init__(processor.tokenizer, model, packs=packs, loss_chunk=loss_chunk)

    def _samples(self, pad_token_id: int) -> Collator:
        return PictureCollator(pad_token_id, self._size, PAD_TO_MULTIPLE_OF)

    def prepared(self, batch: Batch) -> Batch:
        self.problems += batch.pop("problems", [])
        return super().prepared(batch)
