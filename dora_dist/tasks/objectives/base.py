"""`Objective`: what a run minimises and measures, and what the tasks' objectives share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from dora_dist.data import InRows, WithFiller

Batch = dict[str, Any]
PAD_TO_MULTIPLE_OF = 8  # few shapes: fewer kernels to build


class Objective(ABC):
    """One for each run: `collator` makes batches of samples, `filler` is a sample without loss.

    `loss` is loss(outputs, labels, num_items_in_batch) of this rank's batch divided by the items of all ranks; None:
    the model computes it itself. `problems` are messages about this rank's samples that could not be read, and
    carried no loss: whoever reports them clears the list. exact: tensors of a batch that stay in fp32 in a run in bf16.
    packs: whether `collator` makes batches of rows of samples.
    """

    exact: ClassVar[tuple[str, ...]] = ()

    collator: Any
    filler: dict[str, Any]
    packs: bool = False
    loss: Callable[..., Tensor] | None = None

    def __init__(self) -> None:
        self.problems: list[str] = []

    def with_filler(self, dataset: Any) -> Dataset[Any]:
        """The data set with the sample FILLER, which carries no loss; by rows where the collator takes rows."""
        filled = WithFiller(dataset, self.filler)
        return InRows(filled) if self.packs else filled

    def prepared(self, batch: Batch) -> Batch:
        """What the model's forward takes."""
        return batch

    def placed(self, batch: Batch) -> Batch:
        """A batch that is on the device now, with what is made there: nothing waits for it."""
        return batch

    def tokens(self, batch: Batch) -> int:
        """How many tokens of a batch in host memory are not padding."""
        return int(batch["attention_mask"].sum())

    def counted(self, batch: Batch) -> Batch:
        """A batch whose labels that are not IGNORED are the items that `loss` is divided by the number of."""
        return batch

    def row_losses(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Of each row the sum of its tokens' losses, fp32, and how many these are, int64, both (rows,).

        Where rows have several samples: the same of each place of a row, both (rows, places). batch: as it was
        `prepared`. None: they are not known. Nothing waits for the device.
        """
        return None

    def sources(self, sources: Tensor, batch: Batch) -> Tensor:
        """The source of each of `row_losses`, from those of a batch's rows or tokens (`source_losses.WithSources`)."""
        return sources

    @abstractmethod
    def evaluate(self, model: Any, batches: Iterable[Batch], dataset: Any, device: torch.device) -> dict[str, float]:
        """Metrics over all ranks' `batches` of a `dataset` (collective, if there are ranks); the same on every rank."""


def everyones(batches: list[Tensor]) -> Tensor:
    """This rank's batches of rows -> all ranks' rows, in the data set's order, with its fillers at the end."""
    local = torch.stack(batches)
    if not dist.is_initialized():
        return local.flatten(0, 1)
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    return torch.stack(parts, dim=1).flatten(0, 2)  # rank k has batches k, k + W, ... of the set


def add_up(total: Tensor) -> None:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(total)
