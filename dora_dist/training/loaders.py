"""A run's batches: which samples this rank sees, when, and as what tensors."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from dora_dist.config import TrainingConfig
from dora_dist.config.schema import BatchPlan
from dora_dist.data import EpochBatches, EpochDataLoader, TokenizedData
from dora_dist.runtime.distributed import World
from dora_dist.tasks.objectives.base import Objective


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
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`workers`: loader processes of this rank; 0: the rank itself. `pin_memory`: put batches into page-locked
        memory, from which a copy to the device does not wait for it.
        """
        self.data, self.objective, self.plan = data, objective, plan
        self._world, self._training = world, training
        self._workers, self._pin_memory = workers, pin_memory

    def training(self) -> EpochDataLoader:
        """The training set in the run's order, every sample once per epoch."""
        batches = EpochBatches(
            len(self.data.train),
            global_batch_size=self._training.global_batch_size,
            micro_batch_size=self.plan.micro_batch_size,
            world_size=self._world.world_size,
            rank=self._world.rank,
            seed=self._training.seed,
            order=self.data.train.epoch_order,
            parts=self.data.train.parts.values(),
        )
        return self._loader(self.data.train, batches)

    def evaluation(self, dataset: Any) -> EpochDataLoader:
        """A whole set as it comes, the same number of batches on every rank."""
        batches = EpochBatches.in_order(
            len(dataset),
            micro_batch_size=self._training.micro_batch_size,
            world_size=self._world.world_size,
            rank=self._world.rank,
        )
        return self._loader(dataset, batches)

    def _loader(self, dataset: Any, batches: EpochBatches) -> EpochDataLoader:
        return EpochDataLoader(
            self.objective.with_filler(dataset),
            batch_sampler=batches,
            collate_fn=self.objective.collator,
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
