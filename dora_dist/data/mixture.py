"""Samples of several sources, drawn in proportion to weights: an order that follows from seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dora_dist.data.sampler import FILLER, EpochOrder, parted_seed

SHARES = "samples of each source, and of an epoch"
"""Where a checkpoint says how the sources of a mixture are mixed, in their order."""


class Share(NamedTuple):
    """A source: its samples, and how many samples an epoch has of them, and of all sources."""

    name: str
    samples: int
    drawn: int
    all_drawn: int

    @property
    def passes(self) -> float:
        """How often an epoch goes through it."""
        return self.drawn / self.samples

    def __str__(self) -> str:
        part = f"{self.drawn / self.all_drawn:.1%} of an epoch"
        return f"{self.name}: {part}, {self.drawn:,} draws of {self.samples:,} samples ({self.passes:.2g} passes)"


@dataclass(frozen=True)
class Mixture:
    """Sources by name with their weights.

    An epoch has as many samples as all sources together. Each source gives its share of them, exactly, in a random
    order. A source goes through all its samples, in an order that is new for each pass, before one comes again; a
    pass goes on in the next epoch.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def drawn(self, samples: int) -> list[int]:
        """How many of an epoch's `samples` are of each source: nearest to the weights (largest remainder)."""
        exact = [samples * weight / sum(self.weights) for weight in self.weights]
        found = [int(each) for each in exact]
        by_rest = sorted(range(len(exact)), key=lambda k: (found[k] - exact[k], k))
        for k in by_rest[: samples - sum(found)]:
            found[k] += 1
        return found

    def order(self, sources: Tensor, regroup: Callable[[Tensor], EpochOrder | None]) -> EpochOrder:
        """An epoch's order. sources: (samples,) int64, the source of each. regroup: the order that drawn samples
        (their numbers, int64) have among themselves, where it is more than a permutation.
        """
        members = [(sources == k).nonzero()[:, 0] for k in range(len(self.names))]

        def ordered(seed: int, batch: int) -> list[int]:
            of_run, epoch = parted_seed(seed)
            shares = zip(members, self.drawn(len(sources)), strict=True)
            drawn = torch.cat([_turns(each, epoch * n, n, (of_run, k)) for k, (each, n) in enumerate(shares)])
            drawn = drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))]
            grouped = regroup(drawn)
            if grouped is None:
                return drawn.tolist()
            return [i if i == FILLER else int(drawn[i]) for i in grouped(seed, batch)]

        return ordered


def _turns(members: Tensor, first: int, count: int, seed: tuple[int, int]) -> Tensor:
    """Turns number `first` up to first + count of an endless sequence of passes over `members`, each shuffled."""
    size, found = len(members), []
    for number in range(first // size, -(-(first + count) // size)):
        generator = torch.Generator().manual_seed((seed[0] * 1_000_003 + number) * 8191 % 2**62 + seed[1])
        start, stop = max(first - number * size, 0), min(first + count - number * size, size)
        found.append(members[torch.randperm(size, generator=generator)[start:stop]])
    return torch.cat(found) if found else members[:0]


def sources_of(bounds: Tensor, records: Tensor) -> Tensor:
    """(k,) int64: which source each of some records is of. bounds: (sources + 1,) the records where each begins."""
    return torch.searchsorted(bounds, records, right=True) - 1


def shares(mixture: Mixture, sources: Tensor) -> Sequence[Share]:
    """What an epoch has of each source."""
    counts = torch.bincount(sources, minlength=len(mixture.names)).tolist()
    drawn = mixture.drawn(len(sources))
    return [Share(*each, sum(drawn)) for each in zip(mixture.names, counts, drawn, strict=True)]
