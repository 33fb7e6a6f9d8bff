"""Samples to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dora_dist.data.dataset import IGNORED
from dora_dist.data.sampler import FILLER

Sample = dict[str, list[int]]


class WithFiller(Dataset[Sample]):
    """A data set with one more index, FILLER: a padding token without a label, so without loss."""

    def __init__(self, dataset: Any, pad_token_id: int):
        self.dataset, self.pad_token_id = dataset, pad_token_id

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Sample:
        if i == FILLER:
            return {"input_ids": [self.pad_token_id], "labels": [IGNORED]}
        return self.dataset[i]


class Collator:
    """Pads samples on the right to the longest of the batch."""

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None):
        """pad_to_multiple_of: round the batch's length up (8 suits tensor cores)."""
        self.pad_token_id, self.multiple = pad_token_id, pad_to_multiple_of or 1

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """input_ids, labels, attention_mask: (samples, length) int64. Padding has label -100 and mask 0."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        length = -(-longest // self.multiple) * self.multiple
        batch = {
            "input_ids": torch.full((len(samples), length), self.pad_token_id),
            "labels": torch.full((len(samples), length), IGNORED),
            "attention_mask": torch.zeros((len(samples), length), dtype=torch.int64),
        }
        for row, sample in enumerate(samples):
            stop = len(sample["input_ids"])
            batch["input_ids"][row, :stop] = torch.tensor(sample["input_ids"])
            batch["labels"][row, :stop] = torch.tensor(sample["labels"])
            batch["attention_mask"][row, :stop] = 1
        return batch
