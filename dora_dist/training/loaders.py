"""A run's batches: which samples this rank sees, when, and as what tensors."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from dora_dist.checkpoint.resuming import optimizer_steps
from dora_dist.config import RunConfig, TrainingConfig
from dora_dist.config.schema import BatchPlan
from dora_dist.data import EpochBatches, EpochDataLoader, Packing, RaggedDataset, TokenizedData
from dora_dist.data.packing import filled, packed_plan, passes_over
from dora_dist.runtime.distributed import World
from dora_dist.tasks.objectives.base import PAD_TO_MULTIPLE_OF, Objective
from dora_dist.training.source_losses import WithSources
from dora_dist.training.unreadable import WithProblems


def batch_plan(config: RunConfig, data: TokenizedData, world_size: int) -> BatchPlan:
    """How a rank takes its part of every global batch; with data.packing that follows from the samples' lengths.

    Raises UserError for more ranks than records.
    """
    training, train = config.training, data.train
    plan = training.batch_plan(world_size)
    if not config.data.packing:
        return plan
    return packed_plan(
        epoch_batches(train, training, plan, world_size=world_size),
        Packing(train.lengths, config.data.longest_row),
        steps=optimizer_steps(training, train.parts),
        micro_batch_size=training.micro_batch_size,
    )


def packed_rows(config: RunConfig, data: TokenizedData, world_size: int) -> str:
    """What data.packing does on so many ranks, for a person: passes and filled places with it and without."""
    training, train = config.training, data.train
    lengths = train.lengths.tolist()

    def said(plan: BatchPlan, row_length: int | None, what: str) -> str:
        batches = [
            epoch_batches(train, training, plan, world_size=world_size, rank=rank, row_length=row_length)
            for rank in range(world_size)
        ]
        share = filled(batches, lengths, PAD_TO_MULTIPLE_OF)
        passes = f"{plan.accumulation_steps:,} {'pass' if plan.accumulation_steps == 1 else 'passes'}"
        return f"{passes} of {plan.micro_batch_size:,} {what}, {share:.1%} filled"

    packed = said(batch_plan(config, data, world_size), config.data.longest_row, "rows")
    alone = said(training.batch_plan(world_size), None, "records")
    return (
        f"packed into rows of at most {config.data.longest_row:,} tokens: a step is {packed} on each of {world_size:,} "
        f"rank{'' if world_size == 1 else 's'} (unpacked: {alone})"
    )


def epoch_batches(
    train: RaggedDataset,
    training: TrainingConfig,
    plan: BatchPlan,
    *,
    world_size: int,
    rank: int = 0,
    row_length: int | None = None,
) -> EpochBatches:
    """One rank's micro-batches of a training set, in rows of at most `row_length` tokens if that is given."""
    return EpochBatches(
        len(train),
        global_batch_size=training.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        world_size=world_size,
        rank=rank,
        seed=training.seed,
        order=train.epoch_order,
        parts=train.parts.values(),
        packing=None if row_length is None else Packing(train.lengths, row_length),
        passes=plan.accumulation_steps,
    )


class Loaders:
    """Makes the loaders of one rank, for training and for evaluation; the order of samples is `EpochBatches`'."""

    def __init__(
        self,
        data: TokenizedData,
        objective: Objective,
        plan: BatchPlan,
        *,
        world: World,
        training: TrainingConfig,
        row_length: int | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`row_length`: tokens of a row of several samples; None: a row for each. `workers`: loader processes of this
        rank; 0: the rank itself. `pin_memory`: put batches into page-locked memory, from which a copy to the device
        does not wait for it.
        """
        self.data, self.objective, self.plan = data, objective, plan
        self._world, self._training = world, training
        self._row_length, self._workers, self._pin_memory = row_length, workers, pin_memory
        self._passes: dict[Any, int] = {}  # over each data set in rows, found once: it takes a while

    def training(self) -> EpochDataLoader:
        """The training set in the run's order, every sample once per epoch."""
        batches = epoch_batches(
            self.data.train,
            self._training,
            self.plan,
            world_size=self._world.world_size,
            rank=self._world.rank,
            row_length=self._row_length,
        )
        collator = WithProblems(self.objective.collator) if self._row_length is None else self.objective.collator
        mixed = self.data.train.mixture is not None
        return self._loader(self.data.train, batches, WithSources(collator) if mixed else collator)

    def evaluation(self, dataset: Any) -> EpochDataLoader:
        """A whole set as it comes, the same number of batches on every rank."""
        if self._row_length is not None:
            return self._loader(dataset, self._in_rows(dataset, self._row_length))
        batches = EpochBatches.in_order(
            len(dataset),
            micro_batch_size=self._training.micro_batch_size,
            world_size=self._world.world_size,
            rank=self._world.rank,
        )
        return self._loader(dataset, batches)

    def _in_rows(self, dataset: Any, row_length: int) -> EpochBatches:
        """A whole set as one global batch in rows."""
        packing = Packing(dataset.lengths, row_length)
        micro, world = self._training.micro_batch_size, self._world.world_size
        if dataset not in self._passes:
            self._passes[dataset] = passes_over(packing, micro * world)
        return EpochBatches(
            len(dataset),
            global_batch_size=len(dataset),
            micro_batch_size=micro,
            world_size=world,
            rank=self._world.rank,
            shuffle=False,
            packing=packing,
            passes=self._passes[dataset],
        )

    def _loader(self, dataset: Any, batches: EpochBatches, collator: Any = None) -> EpochDataLoader:
        return EpochDataLoader(
            self.objective.with_filler(dataset),
            batch_sampler=batches,
            collate_fn=collator or self.objective.collator,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
        )


def on_device(
    batch: dict[str, Any], device: torch.device, dtype: torch.dtype, *, exact: Collection[str] = ()
) -> dict[str, Any]:
    """A batch's tensors on a device, those of floating-point numbers in `dtype` unless they are `exact`.

    From page-locked memory (`Loaders`) no copy waits for the work that the device still has.
    """

    def moved(name: str, values: Any) -> Any:
        if not isinstance(values, Tensor):
            return values
        kept = name in exact or not values.is_floating_point()
        return values.to(device, values.dtype if kept else dtype, non_blocking=True)

    return {name: moved(name, values) for name, values in batch.items()}
