"""Several samples in one row: which samples of a global batch share a row, and how many rows a run needs.

A global batch has the same samples packed or not (`EpochBatches`); packing only says which of them share a row. So
steps, schedule and losses are those of the unpacked run, and a run may be resumed with packing switched on or off.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dora_dist.config.schema import BatchPlan
from dora_dist.data.columns import IGNORED
from dora_dist.data.sampler import FILLER, EpochBatches, batches_of

_MOST_PLACED = 20_000_000
"""Samples that planning looks at: some seconds. What comes later in a very long run may make longer rows."""


class Packing:
    """Shares the samples of a global batch out over rows of about equal length, of at most `capacity` tokens."""

    def __init__(self, lengths: Tensor, capacity: int) -> None:
        """lengths: (samples,) int64, tokens of each sample, none above `capacity`."""
        self.lengths: list[int] = lengths.tolist()
        self.capacity = capacity

    def rows(self, samples: Sequence[int], count: int) -> list[tuple[int, ...]]:
        """The samples in `count` rows, from the longest row to the shortest; a row without a sample has FILLER.

        The longest sample left goes to the shortest row (Graham's LPT rule): rows that are read at the same time are
        about equally long, on one rank and over all ranks.
        """
        return [tuple(row) or (FILLER,) for _, row in self._spread(samples, count)]

    def fits(self, samples: Sequence[int], count: int) -> bool:
        """Whether no row of `rows` is longer than the capacity."""
        return self._tokens(samples) <= count * self.capacity and self._spread(samples, count)[0][0] <= self.capacity

    def fewest(self, epochs: Callable[[], Iterable[Iterable[Sequence[int]]]], counts: Sequence[int]) -> int:
        """The first place in `counts`, numbers of rows, with which every global batch of all `epochs` fits.

        The last of `counts` is taken for granted.
        """
        chosen, settled = 0, False
        while not settled:  # more rows might not fit what fewer did: only a whole pass without a change counts
            settled = True
            for batches in epochs():
                for batch in sorted(batches, key=lambda batch: -self._tokens(batch)):
                    while chosen < len(counts) - 1 and not self.fits(batch, counts[chosen]):
                        chosen, settled = chosen + 1, False
        return chosen

    def _tokens(self, samples: Sequence[int]) -> int:
        return sum(self.lengths[i] for i in samples if i != FILLER)

    def _spread(self, samples: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
        """Length and samples of each row, the longest first."""
        rows: list[list[int]] = [[] for _ in range(count)]
        shortest = [(0, row) for row in range(count)]  # a heap
        for sample in sorted((i for i in samples if i != FILLER), key=lambda sample: -self.lengths[sample]):
            length, row = shortest[0]
            heapq.heapreplace(shortest, (length + self.lengths[sample], row))
            rows[row].append(sample)
        return [(length, rows[row]) for length, row in sorted(shortest, key=lambda each: (-each[0], each[1]))]


def packed_plan(batches: EpochBatches, packing: Packing, *, steps: int, micro_batch_size: int) -> BatchPlan:
    """The fewest passes of at most `micro_batch_size` rows, into which every global batch of a run fits.

    `batches` says the order of samples (of any rank) and the number of ranks; steps: optimizer steps of the run. There
    are never more passes than without packing: then every sample has a row of its own.
    """
    world, each = batches.world_size, -(-batches.global_batch_size // batches.world_size)
    micro = [min(micro_batch_size, -(-each // passes)) for passes in range(1, -(-each // micro_batch_size) + 1)]
    counts = [world * passes * rows for passes, rows in enumerate(micro, start=1)]
    samples = max(sum(batches.parts), 1)
    an_epoch = max(batches_of(batches.parts, batches.global_batch_size), 1)
    number = min(-(-steps // an_epoch), max(_MOST_PLACED // samples, 1))

    def epochs() -> Iterable[Iterable[Sequence[int]]]:
        for epoch in range(number):
            batches.set_epoch(epoch)
            yield list(batches.global_batches())

    chosen = packing.fewest(epochs, counts)
    return BatchPlan(micro[chosen], chosen + 1, 0)


def passes_over(packing: Packing, across: int) -> int:
    """How many passes over a whole set its samples need in rows, of which all ranks take `across` in a pass.

    Tries a number of passes some log2(passes) times: one takes a while for a large set.
    """
    everything = range(len(packing.lengths))
    alone = sum(2 * length > packing.capacity for length in packing.lengths)  # no two of these share a row
    tokens = -(-sum(packing.lengths) // packing.capacity)
    fewer = -(-max(tokens, alone, 1) // across) - 1  # too few
    step = 1
    while not packing.fits(everything, (fewer + step) * across):
        fewer, step = fewer + step, 2 * step
    passes = fewer + step
    while passes - fewer > 1:
        middle = (fewer + passes) // 2
        if packing.fits(everything, middle * across):
            passes = middle
        else:
            fewer = middle
    return passes


def filled(ranks: Iterable[EpochBatches], lengths: Sequence[int], multiple: int) -> float:
    """The share of an epoch's places, over all ranks' batches, that are not padding.

    A batch is as long as its longest row, rounded up to a multiple of `multiple`; lengths: tokens of each sample.
    """
    tokens = places = 0
    for batches in ranks:
        for batch in batches:
            rows = [row if isinstance(row, tuple) else (row,) for row in batch]
            each = [sum(lengths[i] if i != FILLER else 0 for i in row) for row in rows]
            tokens += sum(each)
            places += len(rows) * -(-max(*each, 1) // multiple) * multiple
    return tokens / max(places, 1)


class InRows(Dataset[list[Any]]):
    """A data set whose indices are those of several samples each: a row of samples."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, row: tuple[int, ...]) -> list[Any]:
        return [self.dataset[i] for i in row]


class RowCollator:
    """Batches of rows, padded on the right to the longest row.

    The first label of a sample is IGNORED: what is before it in the row must not be asked for it.
    """

    def __init__(self, samples: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        """samples: collates rows, each as one long sample."""
        self.samples = samples

    def __call__(self, rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """What `samples` makes, without an attention mask, and with (rows, length) int64: position_ids, which begin at
        0 with each sample, and segments, the number of a token's sample in its row, or -1 for padding. The same for
        attention that reads samples one by one: bounds (samples + 1,) int32, where each begins in the flattened batch,
        padding behind a row being another one, and longest, the tokens of the longest.
        """
        batch = self.samples([_joined(row) for row in rows])
        shape = batch.pop("attention_mask").shape
        positions, segments = batch["input_ids"].new_zeros(shape), batch["input_ids"].new_full(shape, -1)
        lengths = []
        for i, row in enumerate(rows):
            start = 0
            for number, sample in enumerate(row):
                here = slice(start, start := start + len(sample["input_ids"]))
                positions[i, here] = torch.arange(here.stop - here.start)
                segments[i, here] = number
                lengths.append(here.stop - here.start)
            if padding := shape[1] - start:
                positions[i, start:] = torch.arange(padding)
                lengths.append(padding)
        bounds = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
        if problems := [sample["problem"] for row in rows for sample in row if "problem" in sample]:
            batch["problems"] = problems
        own = {"position_ids": positions, "segments": segments, "bounds": bounds, "longest": max(lengths)}
        return {**batch, **own}


def _joined(row: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The samples of a row, one behind the other."""
    return {
        "input_ids": [token for sample in row for token in sample["input_ids"]],
        "labels": [label for sample in row for label in [IGNORED, *sample["labels"][1:]]],
        "pictures": [picture for sample in row for picture in sample.get("pictures", ())],
    }
