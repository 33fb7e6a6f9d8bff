"""Which samples each rank trains on at each step: an order that does not depend on the world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

FILLER = -1
"""A place of a global batch beyond its last sample; `WithFiller` puts a sample without loss there."""
SAMPLES = "number of training samples"
"""Where a checkpoint says how many samples an epoch has, if that is known."""
EpochOrder = Callable[[int, int], Sequence[int]]
"""(seed of an epoch, global batch size) -> every sample once, one global batch after the other.

A batch that is not full is filled up with FILLER. Sample i + k·n is variant k of sample i, where there are n.
"""


class Rows(Protocol):
    """What puts samples into rows (`packing.Packing`)."""

    def rows(self, samples: Sequence[int], count: int) -> list[tuple[int, ...]]:
        """The samples in `count` rows; one without a sample has FILLER."""


_EPOCHS = 1_000_003


def parted_seed(seed: int) -> tuple[int, int]:
    """The seed of a run (below 2^43) and the number of an epoch, from the seed of that epoch."""
    return divmod(seed, _EPOCHS)


def batches_of(parts: Iterable[int], batch: int) -> int:
    """Global batches of an epoch with so many samples of each kind, no two of which share a batch."""
    return sum(-(-samples // batch) for samples in parts)


class EpochBatches(BatchSampler):
    """One rank's micro-batches of an epoch, cut from global batches that are the same at every world size.

    The epoch's order is a permutation from (seed, epoch). The ranks' micro-batches of optimizer step t together are
    exactly global batch t, whatever the world size and micro-batch size, with FILLER where the ranks do not divide
    it: a run can stop at 8 ranks and go on at 6 after the same samples. Every sample is seen once per epoch.
    With packing a micro-batch is of rows, each a tuple of samples; the samples of a global batch stay the same.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int,
        rank: int,
        seed: int = 0,
        shuffle: bool = True,
        order: EpochOrder | None = None,
        parts: Iterable[int] | None = None,
        packing: Rows | None = None,
        passes: int = 1,
    ):
        """order: an epoch's order, where it is more than a permutation. parts: samples of each kind, where no two kinds
        share a global batch. packing: puts samples into rows, of which a micro-batch has `micro_batch_size`, and a
        global batch `passes` micro-batches on each rank."""
        self.parts = [num_samples] if parts is None else list(parts)
        self.num_samples, self.seed, self.shuffle, self.order = num_samples, seed, shuffle, order
        self.global_batch_size, self.batch_size = global_batch_size, micro_batch_size
        self.world_size, self.rank = world_size, rank
        self.packing, self.passes = packing, passes
        self.drop_last = False
        self.epoch = 0

    @classmethod
    def in_order(cls, num_samples: int, *, micro_batch_size: int, world_size: int, rank: int) -> EpochBatches:
        """Batches for evaluation: the samples as they come, the same number of batches on every rank."""
        return cls(
            num_samples,
            global_batch_size=micro_batch_size * world_size,
            micro_batch_size=micro_batch_size,
            world_size=world_size,
            rank=rank,
            shuffle=False,
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches per epoch on this rank."""
        return batches_of(self.parts, self.global_batch_size) * self._places // self._across_ranks

    def global_batches(self) -> Iterator[Sequence[int]]:
        """The samples of each optimizer step of the epoch, over all ranks."""
        order = self._order()
        for first in range(0, len(order), self.global_batch_size):
            yield order[first : first + self.global_batch_size]

    def __iter__(self) -> Iterator[list[Any]]:
        for samples in self.global_batches():
            if self.packing is not None:
                batch: list[Any] = self.packing.rows(samples, self._places)
            else:
                batch = [*samples, *[FILLER] * (self._places - len(samples))]
            for start in range(self.rank * self.batch_size, self._places, self._across_ranks):
                yield batch[start : start + self.batch_size]

    @property
    def _across_ranks(self) -> int:
        return self.batch_size * self.world_size

    @property
    def _places(self) -> int:
        """Samples or rows that all ranks together take for one global batch, fillers among them."""
        if self.packing is not None:
            return self.passes * self._across_ranks
        return -(-self.global_batch_size // self._across_ranks) * self._across_ranks

    def _order(self) -> Sequence[int]:
        # One 64-bit seed from the two: adding them would make epoch 1 of seed 0 equal epoch 0 of seed 1.
        seed = (self.seed * _EPOCHS + self.epoch) % 2**63
        if self.order is not None:
            return self.order(seed, self.global_batch_size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed)
            order: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
            return order
        return list(range(self.num_samples))


def grouped_order(lengths: Tensor, pictured: Tensor, seed: int, batch: int) -> list[int]:
    """All samples in a random order of batches whose samples all have pictures, or all have none.

    Which samples of a kind share a batch of `batch` is random; inside a batch they go from long to short, so that
    the micro-batches cut from it hold little padding. What does not fill a batch of its kind is mixed at the end.
    `lengths` (samples,) int64 counts tokens, `pictured` (samples,) bool says which samples have pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(lengths), generator=generator)
    of_kind = [shuffled[pictured[shuffled]], shuffled[~pictured[shuffled]]]
    whole = [part for kind in of_kind for part in kind[: len(kind) // batch * batch].split(batch) if len(part)]
    rest = torch.cat([kind[len(kind) // batch * batch :] for kind in of_kind])
    order = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
    order += [part for part in rest.split(batch) if len(part)]
    long_first = lengths + (int(lengths.max()) + 1) * pictured
    return [i for part in order for i in part[long_first[part].argsort(descending=True, stable=True)].tolist()]


def subtask_order(
    kinds: Tensor, lengths: Tensor, scores: Tensor, starts: Tensor, drawn: Tensor, seed: int, batch: int
) -> list[int]:
    """All samples in a random order of batches of one kind each; the last batch of a kind is filled up with FILLER.

    A sample has one variant or more. Of a `drawn` sample (samples,) bool the epoch has one, by `scores`; of any other
    it has each. `scores` are those of all variants, flat, from starts[i] up to starts[i + 1] for sample i. Inside a
    batch, samples go from long to short (`lengths`, in tokens), so that the micro-batches cut from it hold little
    padding. All is from `seed` alone. kinds, lengths (samples,) int64; starts (samples + 1,) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(kinds)
    chosen = _drawn(scores.double(), starts, torch.rand(count, generator=generator, dtype=torch.float64))
    each = torch.where(drawn, 1, starts.diff())
    samples = torch.arange(count).repeat_interleave(each)
    first = (each.cumsum(0) - each).repeat_interleave(each)
    variants = torch.where(drawn[samples], chosen[samples], torch.arange(len(samples)) - first)
    shuffled = torch.randperm(len(samples), generator=generator)
    batches = []
    for kind in kinds.unique().tolist():
        for part in shuffled[kinds[samples[shuffled]] == kind].split(batch):
            ordered = part[lengths[samples[part]].argsort(descending=True, stable=True)]
            places = samples[ordered] + count * variants[ordered]
            batches.append([*places.tolist(), *[FILLER] * (batch - len(part))])
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [place for number in order for place in batches[number]]


def _drawn(scores: Tensor, starts: Tensor, uniform: Tensor) -> Tensor:
    """(n,) int64: a variant of each sample, with a probability that is its share of the sample's scores.

    0 where all scores of a sample are 0. `uniform` (n,) fp64 in [0, 1).
    """
    after = scores.cumsum(0)
    before = torch.cat([after.new_zeros(1), after])[starts[:-1]]
    total = torch.cat([after.new_zeros(1), after])[starts[1:]] - before
    found = torch.searchsorted(after, before + uniform * total, right=True) - starts[:-1]
    # Rounding must not lead into the next sample, nor beyond the last variant that has a score.
    within = torch.minimum(found.clamp(min=0), starts.diff() - 1)
    return torch.where(total > 0, within, 0)


class EpochDataLoader(DataLoader[Any]):
    """A DataLoader over `EpochBatches` whose `set_epoch` reaches them, as training loops expect."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, EpochBatches)
        self.batch_sampler.set_epoch(epoch)
