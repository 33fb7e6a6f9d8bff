"""The order of training: the same global batches at every world size, every sample once."""

from typing import Any

import pytest
import torch
from accelerate import skip_first_batches

from dora_dist.data import FILLER, Collator, EpochBatches, EpochDataLoader, WithFiller, text_filler

# (world size, micro-batch size) pairs that make up a global batch of 24
SPLITS = [(1, 24), (1, 3), (2, 4), (2, 12), (3, 8), (3, 1), (4, 6), (4, 3)]


def batches(num_samples: int, world_size: int, micro: int, rank: int, **options: Any) -> EpochBatches:
    return EpochBatches(
        num_samples,
        global_batch_size=options.pop("global_batch_size", 24),
        micro_batch_size=micro,
        world_size=world_size,
        rank=rank,
        **options,
    )


def global_batches(num_samples: int, world_size: int, micro: int, epoch: int = 0, **options: Any) -> list[list[int]]:
    """What all ranks together train on in each optimizer step."""
    steps: list[list[int]] = []
    accumulation = options.get("global_batch_size", 24) // (world_size * micro)
    for rank in range(world_size):
        sampler = batches(num_samples, world_size, micro, rank, seed=7, **options)
        sampler.set_epoch(epoch)
        mine = list(sampler)
        assert len(mine) == len(sampler)
        assert {len(batch) for batch in mine} == {micro}
        for i, batch in enumerate(mine):
            if i // accumulation == len(steps):
                steps.append([])
            steps[i // accumulation] += batch
    return [sorted(step) for step in steps]


@pytest.mark.parametrize("num_samples", [1, 23, 24, 100])
def test_every_step_sees_the_same_samples_at_every_world_size(num_samples: int) -> None:
    reference = global_batches(num_samples, 1, 24)
    assert sorted(i for step in reference for i in step if i != FILLER) == list(range(num_samples))
    assert len(reference) == -(-num_samples // 24)
    for world_size, micro in SPLITS:
        assert global_batches(num_samples, world_size, micro) == reference


def test_odd_sizes_agree_too() -> None:
    reference = global_batches(50, 1, 15, global_batch_size=15)
    for world_size, micro in [(3, 5), (3, 1), (5, 3), (1, 5)]:
        assert global_batches(50, world_size, micro, global_batch_size=15) == reference


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    first = list(batches(100, 1, 24, 0, seed=3))
    assert list(batches(100, 1, 24, 0, seed=3)) == first
    orders = []
    for seed in (0, 1, 2):
        for epoch in (0, 1, 2):
            sampler = batches(100, 1, 24, 0, seed=seed)
            sampler.set_epoch(epoch)
            orders.append(str(list(sampler)))
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 5), (2, 5), (5, 5), (7, 2)])
def test_ranks_that_do_not_divide_the_global_batch_see_it_all_the_same(ranks: int, micro: int) -> None:
    whole = [sample for batch in batches(100, 1, 24, 0) for sample in batch]
    each = [list(batches(100, ranks, micro, rank)) for rank in range(ranks)]
    passes = -(-24 // (ranks * micro))
    assert {len(one) for one in each} == {5 * passes} == {len(batches(100, ranks, micro, 0))}
    for step in range(5):
        seen = [s for one in each for batch in one[step * passes : (step + 1) * passes] for s in batch]
        assert len(seen) == passes * ranks * micro
        assert sorted(s for s in seen if s != FILLER) == sorted(whole[step * 24 : (step + 1) * 24][: 100 - step * 24])


def test_evaluation_goes_in_order_with_equal_batches_on_every_rank() -> None:
    ranks = [list(EpochBatches.in_order(7, micro_batch_size=2, world_size=3, rank=rank)) for rank in range(3)]
    assert ranks == [[[0, 1], [6, FILLER]], [[2, 3], [FILLER, FILLER]], [[4, 5], [FILLER, FILLER]]]


def loader(num_samples: int, workers: int = 0) -> EpochDataLoader:
    samples = [{"input_ids": [i + 1] * (i % 3 + 1), "labels": [i + 1] * (i % 3 + 1)} for i in range(num_samples)]
    return EpochDataLoader(
        WithFiller(samples, text_filler(0)),
        batch_sampler=batches(num_samples, 2, 4, 1, seed=5),
        collate_fn=Collator(0),
        num_workers=workers,
    )


def seen(batches_: Any) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches_]


def test_skipping_batches_to_resume_gives_the_rest_of_that_epoch() -> None:
    whole = loader(100)
    whole.set_epoch(2)
    expected = seen(whole)
    assert seen(loader(100)) != expected
    again = loader(100)
    again.set_epoch(2)
    rest = skip_first_batches(again, 5)
    assert len(rest) == len(expected) - 5
    assert seen(rest) == expected[5:]


def test_worker_processes_load_the_same_batches() -> None:
    assert seen(loader(30, workers=1)) == seen(loader(30))


def test_filler_is_one_token_that_is_attended_and_has_no_label() -> None:
    batch = next(iter(loader(1)))  # rank 1 of 2 has nothing but filler
    assert batch["input_ids"].tolist() == [[0]] * 4
    assert batch["labels"].tolist() == [[-100]] * 4
    assert batch["attention_mask"].tolist() == [[1]] * 4


def test_padding_is_on_the_right_without_label_or_attention() -> None:
    samples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_token_id=3, pad_to_multiple_of=4)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 3], [8, 3, 3, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [8, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert Collator(3)(samples)["input_ids"].shape == (2, 3)
