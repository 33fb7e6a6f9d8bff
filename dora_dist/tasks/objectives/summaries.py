"""A text written by an encoder-decoder model after it has read another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dora_dist.data import IGNORED, Collator, text_filler
from dora_dist.metrics.rouge import rouge_metrics
from dora_dist.models.chunked_loss import Rows, take_losses_in_chunks
from dora_dist.tasks.objectives.base import PAD_TO_MULTIPLE_OF, Batch, Objective, add_up, everyones


class Summarising(Objective):
    """Cross entropy per token of the summary, after the document; ROUGE of the summaries that the model writes."""

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")  # of a batch, what generation reads

    def __init__(self, tokenizer: Any, model: Any, target_len: int, num_beams: int, *, loss_chunk: Rows = 0) -> None:
        """loss_chunk: as training.loss_chunk says."""
        super().__init__()
        self._in_chunks = take_losses_in_chunks(model, loss_chunk)
        # Loader processes get the collator, and a model's hooks cannot be handed to all kinds of processes.
        self.collator: Any = Collator(tokenizer.pad_token_id, pad_to_multiple_of=PAD_TO_MULTIPLE_OF)
        self._decoder_input = model.prepare_decoder_input_ids_from_labels
        self.filler = text_filler(tokenizer.pad_token_id)
        self.tokenizer, self.target_len = tokenizer, target_len
        # Besides beams and lengths as the model's folder has it: how a summary starts and ends is the model's own.
        self.generation = copy.deepcopy(model.generation_config)
        self.generation.update(
            num_beams=num_beams, max_new_tokens=target_len, max_length=None, min_length=0, do_sample=False
        )
        self.generation.use_cache = True

    def prepared(self, batch: Batch) -> Batch:
        """With the decoder's input: the labels one place later, as the model's configuration has it."""
        found = {**batch, "decoder_input_ids": self._decoder_input(labels=batch["labels"])}
        return {**found, "targets": batch["labels"]} if self._in_chunks else found

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int = 1) -> Tensor:
        return self._sum(outputs, labels) / num_items_in_batch

    def _sum(self, outputs: Any, labels: Tensor) -> Tensor:
        """Of a batch's losses: the model's own where it took them in chunks."""
        loss: Tensor = outputs.loss if outputs.logits is None else _losses(outputs.logits, labels)
        return loss

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        def losses(outputs: Any, labels: Tensor) -> Tensor:
            return torch.stack([self._sum(outputs, labels).double(), (labels != IGNORED).sum().double()])

        summaries, _, total = self._written(model, batches, dataset, losses, device=device)
        add_up(total)
        return {"loss": float(total[0] / total[1]), **rouge_metrics(summaries, dataset.references)}

    def _written(
        self,
        model: Any,
        batches: Iterable[Batch],
        dataset: Any,
        losses: Callable[[Any, Tensor], Tensor],
        *,
        device: torch.device,
    ) -> tuple[list[str], list[bool], Tensor]:
        """The texts of all samples, and whether each has labels (collective); and the sum (2,) fp64 of this rank's
        `losses` of outputs, labels."""
        written, total = [], torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            batch = self.prepared(batch)
            labels = batch.pop("labels")
            total += losses(model(**batch), labels)
            tokens = self._generate(model, batch)
            tokens = F.pad(tokens, (0, self.target_len + 1 - tokens.shape[1]), value=self.tokenizer.pad_token_id)
            written.append(torch.cat([tokens, labels[:, :1]], dim=1))
        tokens, first = everyones(written)[: len(dataset)].split([self.target_len + 1, 1], dim=1)
        labelled: list[bool] = (first[:, 0] != IGNORED).tolist()
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True), labelled, total

    def _generate(self, model: Any, batch: Batch) -> Tensor:
        """(rows, 1 + generated) token ids: the decoder's start, then the summaries."""
        several = dist.is_initialized() and dist.get_world_size() > 1
        return model.generate(
            **{name: batch[name] for name in self.inputs},
            generation_config=self.generation,
            synced_gpus=several,  # a rank that is done goes on for the others, which gather weights with it
        )


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over labelled tokens; logits (rows, length, vocabulary), labels (rows, length)."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
