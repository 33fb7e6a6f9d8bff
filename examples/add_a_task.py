"""Add a task: a tag for every word of a text, such as which words are names.

transformers has the models (`AutoModelForTokenClassification`); a task says how its records are read, what the loss is
and what is measured. Put the file where Python finds modules (`PYTHONPATH=examples`), and name the module, the task and
its format in a run's configuration:

    {"plugins": ["add_a_task"], "model": {"path": "roberta-base", "task": "tagging", "num_labels": 3},
     "data": {"train": "tagged.jsonl", "format": "tagged"}, ...}

A record is {"words": ["Ada", "met", "Grace"], "tags": [1, 0, 1]}. Training on ranks, checkpoints, merging and
`dora-dist evaluate runs/mine --tasks test=tagged.jsonl --plugins add_a_task` follow by themselves.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.config import DataConfig, ModelConfig, TrainingConfig
from dora_dist.data import IGNORED, Collator
from dora_dist.data.columns import Columns
from dora_dist.data.doubts import Doubts
from dora_dist.data.records import Record
from dora_dist.data.texts import TokensReader
from dora_dist.models import heads
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import Task, register
from dora_dist.tasks.objectives.base import Batch, Objective, add_up

# What the model ends in, and PEFT's name of it, by which a saved adapter is recognised.
HEAD = heads.Head("tagging", "AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", "TOKEN_CLS")


class TaggedReader(TokensReader):
    """A sample is, as for other texts, {"input_ids", "labels"}; a label is the tag of a word, at its first token."""

    learnt = '"words"'  # in messages

    def __init__(self, data: DataConfig, tokenizer: Any, num_labels: int) -> None:
        super().__init__(data, tokenizer)
        self.num_labels = num_labels

    @property
    def fields(self) -> Mapping[str, type]:
        return {"words": list, "tags": list}

    def settings(self) -> dict[str, Any]:
        """All that `encode` follows from: what it makes is cached, once for all ranks of a node."""
        return {**super().settings(), "num_labels": self.num_labels}

    def encode(self, records: Sequence[tuple[str, Record]], into: Columns, doubts: Doubts) -> None:
        for place, record in records:
            words, tags = record["words"], record["tags"]
            known = range(self.num_labels)
            if not all(isinstance(word, str) for word in words):
                raise UserError(f'{place}: "words" must hold texts')
            if len(tags) != len(words) or not all(isinstance(tag, int) and tag in known for tag in tags):
                raise UserError(f'{place}: "tags" must hold a number from 0 to {known[-1]} for each of "words"')
            doubts.look(place, words, empty=not words)  # collects what is warned of: empty texts, special tokens
            encoded = self.tokenizer(words, is_split_into_words=True, verbose=False)
            before, labels = None, []
            for word in encoded.word_ids():  # which word a token is of; None for special tokens
                labels.append(IGNORED if word is None or word == before else tags[word])
                before = word
            into.values(lengths=len(labels))  # before cutting: statistics count what is cut
            stop = self.data.longest_text
            # Two columns of rows of different lengths, whose bounds are the column "starts".
            into.ragged("starts", tokens=encoded.input_ids[:stop], labels=labels[:stop])


class Tagging(Objective):
    """Cross entropy per tag, and the share of words that are tagged right."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.collator = Collator(tokenizer.pad_token_id, pad_to_multiple_of=8)
        # Ranks whose share of a batch is smaller compute on this sample, so that all of them run every module.
        self.filler = {"input_ids": [tokenizer.pad_token_id], "labels": [IGNORED]}

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int = 1) -> Tensor:
        """Summed over this rank's tags, divided by the number of all ranks': so it does not know the world size."""
        logits = outputs.logits.float().flatten(0, 1)  # (rows · length, num_labels)
        total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / num_items_in_batch

    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        total = torch.zeros(3, dtype=torch.float64, device=device)  # loss, tags that are right, tags
        for batch in batches:
            labels = batch.pop("labels")
            outputs = model(**batch)
            right = (outputs.logits.argmax(-1) == labels).sum()
            total += torch.stack([self.loss(outputs, labels).double(), right, (labels != IGNORED).sum()])
        add_up(total)  # over ranks
        loss, right, count = total.tolist()
        return {"loss": loss / count, "accuracy": right / count}


class TaggingTask(Task):
    name = "tagging"
    formats = ("tagged",)

    def metrics(self, model: ModelConfig) -> tuple[str, ...]:
        """Besides the loss, what training.metric may name."""
        return ("accuracy",)

    def head(self, model: ModelConfig) -> heads.Head:
        return HEAD.with_labels(model.num_labels)

    def reader(self, processor: Any, *, model: ModelConfig, data: DataConfig) -> TaggedReader:
        return TaggedReader(data, processor, model.num_labels)

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Tagging:
        return Tagging(processor)


heads.register(HEAD)
register(TaggingTask())
