"""What a run minimises and measures: how samples become batches, batches a loss, and a validation set metrics."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dora_dist.config import RunConfig
from dora_dist.data import IGNORED, Collator, LabelledCollator, WithFiller, WithLabelledFiller
from dora_dist.data.pictures import PictureCollator, PictureProcessor
from dora_dist.metrics.glue import classification_metrics, rating_metrics
from dora_dist.metrics.rouge import rouge_metrics
from dora_dist.metrics.squad import predict, squad_metrics
from dora_dist.models.heads import CLASSIFICATION, IMAGE_TEXT, QUESTIONS, SEQ2SEQ_LM
from dora_dist.models.vocabulary import agree_on_padding

Batch = dict[str, Any]
PAD_TO_MULTIPLE_OF = 8  # few shapes: fewer kernels to build


class Objective(Protocol):
    """One per task of a model."""

    collator: Any

    @property
    def loss(self) -> Callable[..., Tensor] | None:
        """loss(outputs, labels, num_items_in_batch), of all ranks' items; None: the model computes it itself."""
        ...

    def with_filler(self, dataset: Any) -> Any:
        """The data set with the sample FILLER, which carries no loss."""
        ...

    def prepared(self, batch: Batch) -> Batch:
        """What the model's forward takes."""
        ...

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        """Metrics over all ranks' `batches` of a `dataset` (collective, if there are ranks); the same on every rank."""
        ...


def objective(config: RunConfig, tokenizer: Any, model: Any) -> Objective:
    """The objective of a run's task, for a `model` of transformers."""
    if config.model.task == CLASSIFICATION:
        agree_on_padding(model, tokenizer)
        return Labelling(tokenizer, config.model.num_labels)
    if config.model.task == QUESTIONS:
        return SpanFinding(tokenizer, config.data.cutoff_len)
    if config.model.task == SEQ2SEQ_LM:
        return Summarising(tokenizer, model, config.data.target_len, config.training.num_beams)
    if config.model.task == IMAGE_TEXT:
        return PictureModelling(tokenizer)
    return LanguageModelling(tokenizer)


class LanguageModelling:
    """Cross entropy per valid token."""

    loss = None

    def __init__(self, tokenizer: Any) -> None:
        self.collator = Collator(tokenizer.pad_token_id, pad_to_multiple_of=PAD_TO_MULTIPLE_OF)

    def with_filler(self, dataset: Any) -> WithFiller:
        return WithFiller(dataset, self.collator.pad_token_id)

    def prepared(self, batch: Batch) -> Batch:
        return labelled_positions(batch)

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            batch = labelled_positions(batch)
            # num_items_in_batch=1 makes the model return the SUM of its tokens' losses.
            total[0] += model(**batch, num_items_in_batch=1).loss.double()
            total[1] += (batch["shift_labels"] != IGNORED).sum()
        _add_up(total)
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
    """Cross entropy per valid token of texts with pictures.

    `problems` are messages about this rank's samples whose pictures could not be read; they carried no loss.
    """

    def __init__(self, processor: PictureProcessor) -> None:
        self.collator = PictureCollator(processor.tokenizer.pad_token_id, processor.size, PAD_TO_MULTIPLE_OF)
        self.problems: list[str] = []

    def prepared(self, batch: Batch) -> Batch:
        self.problems += batch.pop("problems", [])
        return super().prepared(batch)

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        return super().evaluate(model, (self._without_problems(batch) for batch in batches), dataset, device)

    def _without_problems(self, batch: Batch) -> Batch:
        self.problems += batch.pop("problems", [])
        return batch


class Labelling:
    """Cross entropy per sample over `num_labels` labels, or the squared error where that is 1 (a rating)."""

    def __init__(self, tokenizer: Any, num_labels: int) -> None:
        self.rating = num_labels == 1
        self.collator = LabelledCollator(tokenizer, self.rating, PAD_TO_MULTIPLE_OF)

    def with_filler(self, dataset: Any) -> WithLabelledFiller:
        return WithLabelledFiller(dataset, self.collator.pad_token_id)

    def prepared(self, batch: Batch) -> Batch:
        return batch

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int = 1) -> Tensor:
        # The models' own losses are means over rows, fillers among them: they would depend on the world size.
        return _label_losses(outputs.logits, labels, self.rating) / num_items_in_batch

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        found, expected = [], []
        for batch in batches:
            expected.append(batch.pop("labels").double())
            found.append(model(**batch).logits.double())
        logits, labels = (_everyones(part)[: len(dataset)] for part in (found, expected))
        loss = float(_label_losses(logits, labels, self.rating) / len(dataset))
        metrics = rating_metrics(logits[:, 0], labels) if self.rating else classification_metrics(logits, labels)
        return {"loss": loss, **metrics}


def _label_losses(logits: Tensor, labels: Tensor, rating: bool) -> Tensor:
    """The sum over rows that have a label; logits (rows, num_labels), labels (rows,)."""
    if not rating:
        return F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED, reduction="sum")
    valid = labels != IGNORED
    return ((logits[:, 0].float() - labels.float()).square() * valid).sum()


def _everyones(batches: list[Tensor]) -> Tensor:
    """This rank's batches of rows -> all ranks' rows, in the data set's order, with its fillers at the end."""
    local = torch.stack(batches)
    if not dist.is_initialized():
        return local.flatten(0, 1)
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    return torch.stack(parts, dim=1).flatten(0, 2)  # rank k has batches k, k + W, ... of the set


def _add_up(total: Tensor) -> None:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(total)


class SpanFinding:
    """Cross entropy of the answer's first and of its last token, averaged."""

    def __init__(self, tokenizer: Any, cutoff_len: int) -> None:
        self.collator = LabelledCollator(tokenizer, False, PAD_TO_MULTIPLE_OF)
        self.longest = -(-cutoff_len // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        self._mask: Tensor | None = None  # of the batch that the next loss is of

    def with_filler(self, dataset: Any) -> WithLabelledFiller:
        return WithLabelledFiller(dataset, self.collator.pad_token_id, labels=2)

    def prepared(self, batch: Batch) -> Batch:
        self._mask = batch["attention_mask"]
        return batch

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int = 1) -> Tensor:
        assert self._mask is not None
        return _span_losses(_span_logits(outputs, self._mask), labels) / num_items_in_batch

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        found, total = [], torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            labels = batch.pop("labels")
            logits = _span_logits(model(**batch), batch["attention_mask"])
            total[0] += _span_losses(logits, labels)
            total[1] += (labels != IGNORED).sum()
            found.append(F.pad(logits, (0, 0, 0, self.longest - logits.shape[1]), value=_IMPOSSIBLE))
        _add_up(total)
        logits = _everyones(found)[: len(dataset)].cpu()
        answers = predict(dataset.questions, dataset.windows, logits)
        return {"loss": float(total[0] / total[1]), **squad_metrics(dataset.questions, answers)}


_IMPOSSIBLE = -1e4
"""A logit whose exponential is 0; finite, so that sums of it are."""


def _span_logits(outputs: Any, mask: Tensor) -> Tensor:
    """(rows, length, 2), fp32. Padding is impossible: how much there is would make the loss depend on the batch."""
    logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=2).float()
    # In training the mask is the loader's, from before the batch went to the device.
    padding = mask.to(logits.device, non_blocking=True)[..., None] == 0
    return logits.masked_fill(padding, _IMPOSSIBLE)


def _span_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over both ends; labels (rows, 2)."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


class Summarising:
    """Cross entropy per token of the summary, after the document; ROUGE of the summaries that the model writes."""

    def __init__(self, tokenizer: Any, model: Any, target_len: int, num_beams: int) -> None:
        from transformers import DataCollatorForSeq2Seq

        # Padding, labels and, from `model`'s configuration, the decoder's input: the labels one place later.
        self.collator = DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=PAD_TO_MULTIPLE_OF)
        self.tokenizer, self.target_len = tokenizer, target_len
        # Beside beams and lengths as the model's folder has it: how a summary starts and ends is the model's own.
        self.generation = copy.deepcopy(model.generation_config)
        self.generation.update(
            num_beams=num_beams, max_new_tokens=target_len, max_length=None, min_length=0, do_sample=False
        )
        self.generation.use_cache = True

    def with_filler(self, dataset: Any) -> WithFiller:
        return WithFiller(dataset, self.tokenizer.pad_token_id)

    def prepared(self, batch: Batch) -> Batch:
        return batch

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int = 1) -> Tensor:
        return _token_losses(outputs.logits, labels) / num_items_in_batch

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        written, total = [], torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            labels = batch.pop("labels")
            total[0] += _token_losses(model(**batch).logits, labels)
            total[1] += (labels != IGNORED).sum()
            tokens = self._generate(model, batch)
            written.append(F.pad(tokens, (0, self.target_len + 1 - tokens.shape[1]), value=self.tokenizer.pad_token_id))
        _add_up(total)
        tokens = _everyones(written)[: len(dataset)]
        summaries = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return {"loss": float(total[0] / total[1]), **rouge_metrics(summaries, dataset.references)}

    def _generate(self, model: Any, batch: Batch) -> Tensor:
        """(rows, 1 + generated) token ids: the decoder's start, then the summaries."""
        several = dist.is_initialized() and dist.get_world_size() > 1
        return model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=self.generation,
            synced_gpus=several,  # a rank that is done goes on for the others, which gather weights with it
        )


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over labelled tokens; logits (rows, length, vocabulary), labels (rows, length)."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
