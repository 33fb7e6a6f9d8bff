"""Several samples in one row: which share one, and that a model's losses and gradients do not know it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_dist.config import DataConfig, TrainingConfig
from dora_dist.data import FILLER, IGNORED, Collator, EpochBatches, Packing, RowCollator, TextReader, read
from dora_dist.data.packing import filled, packed_plan, passes_over
from dora_dist.models.families import _FAMILIES
from dora_dist.runtime.distributed import World
from dora_dist.tasks.objectives.language import LanguageModelling, PictureModelling
from dora_dist.training import loaders as loading
from dora_dist.training.loaders import Loaders
from tests import llava, toy

CAPACITY = 64


def lengths(count: int = 50) -> Tensor:
    return torch.randint(2, 40, (count,), generator=torch.Generator().manual_seed(3))


def batches(world_size: int, micro: int, rank: int = 0, **options: Any) -> EpochBatches:
    return EpochBatches(
        50, global_batch_size=12, micro_batch_size=micro, world_size=world_size, rank=rank, seed=5, **options
    )


def test_rows_hold_every_sample_once_are_about_equally_long_and_filled_up() -> None:
    packing = Packing(lengths(), CAPACITY)
    rows = packing.rows(range(12), 5)
    filled = [sum(packing.lengths[i] for i in row) for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(12))
    assert filled == sorted(filled, reverse=True) and filled[0] - filled[-1] < max(packing.lengths[:12])
    assert packing.rows([7, 3], 3) == [(3,), (7,), (FILLER,)] or packing.lengths[7] > packing.lengths[3]
    assert packing.rows([], 1) == packing.rows([FILLER, FILLER], 1) == [(FILLER,)]


@pytest.mark.parametrize(("world_size", "most"), [(1, 1), (1, 4), (2, 2), (3, 1), (5, 2)])
def test_steps_have_the_samples_of_the_unpacked_run_in_the_fewest_rows_that_hold_them(
    world_size: int, most: int
) -> None:
    packing = Packing(lengths(), CAPACITY)
    steps = 3 * 5  # three epochs
    plan = packed_plan(batches(world_size, most), packing, steps=steps, micro_batch_size=most)
    unpacked = TrainingConfig(global_batch_size=12, micro_batch_size=most).batch_plan(world_size)
    assert plan.accumulation_steps <= unpacked.accumulation_steps and plan.micro_batch_size <= most
    fewer = plan.accumulation_steps - 1
    longest = []
    for epoch in range(3):
        expected = batches(1, 12)
        expected.set_epoch(epoch)
        found: list[list[int]] = [[] for _ in range(5)]
        for rank in range(world_size):
            mine = batches(world_size, plan.micro_batch_size, rank, packing=packing, passes=plan.accumulation_steps)
            mine.set_epoch(epoch)
            assert len(list(mine)) == len(mine) == 5 * plan.accumulation_steps
            for number, rows in enumerate(mine):
                found[number // plan.accumulation_steps] += [i for row in rows for i in row if i != FILLER]
                longest += [sum(packing.lengths[i] for i in row if i != FILLER) for row in rows]
        assert [sorted(step) for step in found] == [sorted(step) for step in expected.global_batches()]
        if fewer:
            count = world_size * fewer * min(most, -(-12 // world_size // fewer))
            assert epoch or not all(packing.fits(step, count) for step in expected.global_batches())
    assert max(longest) <= CAPACITY


def test_rows_hold_less_padding() -> None:
    packing = Packing(lengths(), CAPACITY)
    plan = packed_plan(batches(1, 4), packing, steps=5, micro_batch_size=4)
    rows = batches(1, plan.micro_batch_size, packing=packing, passes=plan.accumulation_steps)
    places = sum(len(batch) * max(sum(packing.lengths[i] for i in row if i >= 0) for row in batch) for batch in rows)
    expected = sum(packing.lengths) / places
    assert filled([rows], packing.lengths, 1) == pytest.approx(expected, rel=0.01)
    assert expected > 0.8
    assert filled([batches(1, 4)], packing.lengths, 1) < 0.7


def test_a_set_to_evaluate_on_is_one_batch_of_rows() -> None:
    packing = Packing(lengths(), CAPACITY)
    passes = passes_over(packing, 4)
    rows = packing.rows(range(50), 4 * passes)
    assert max(sum(packing.lengths[i] for i in row) for row in rows) <= CAPACITY
    assert passes * 4 * CAPACITY < 1.3 * sum(packing.lengths)


@pytest.mark.parametrize("shortest", [33, 22, 2])
def test_rows_of_a_large_set_are_planned_in_few_tries(shortest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of which each has a row of its own, of which two share one, of any length: as few as one by one."""
    each = torch.randint(shortest, shortest + 20, (900,), generator=torch.Generator().manual_seed(3))
    packing = Packing(each, CAPACITY)
    fewest = -(-int(each.sum()) // (CAPACITY * 3))
    while not packing.fits(range(900), 3 * fewest):
        fewest += 1
    fits, tried = packing.fits, list[int]()

    def noted(samples: Sequence[int], count: int) -> bool:
        tried.append(count)
        return fits(samples, count)

    monkeypatch.setattr(packing, "fits", noted)
    assert passes_over(packing, 3) == fewest
    assert len(tried) <= 16


def test_an_evaluation_in_rows_is_planned_once_for_each_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(train=str(toy.write_records(tmp_path / "a.json", 30)), cutoff_len=512, cache=None)
    found = read(TextReader(data, toy.tokenizer()), data, seed=1, progress=False)
    objective, training = LanguageModelling(toy.tokenizer(), None, packs=True), TrainingConfig(micro_batch_size=2)
    world, planned = World(0, 1, 0, 1, "here", "none"), list[int]()

    def noted(packing: Packing, across: int) -> int:
        planned.append(across)
        return passes_over(packing, across)

    monkeypatch.setattr(loading, "passes_over", noted)
    loaders = Loaders(found, objective, training.batch_plan(1), world=world, training=training, row_length=512)
    first, again = (list(loaders.evaluation(found.train).batch_sampler) for _ in range(2))
    assert first == again and planned == [2]


def test_a_row_begins_positions_and_labels_again_with_each_sample() -> None:
    samples = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [8, 9], [4])]
    batch = RowCollator(Collator(0, 4))([samples[:2], samples[2:]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0]]
    i = IGNORED
    assert batch["labels"].tolist() == [[i, 6, 7, i, 9, i, i, i], [i] * 8]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, *range(7)]]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, -1, -1, -1], [0, *[-1] * 7]]
    assert batch["bounds"].tolist() == [0, 3, 5, 8, 9, 16] and batch["longest"] == 7
    assert "attention_mask" not in batch


def language_model(model_type: str, attention: str) -> Any:
    """A small one of a family, whose sliding window, if it has one, is shorter than the samples."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**toy.SIZES, "vocab_size": 300, "head_dim": 6, "tie_word_embeddings": True}
    window: dict[str, Any] = {"sliding_window": 5}
    if model_type.startswith("qwen"):
        window |= {"use_sliding_window": True, "max_window_layers": 1}
    if model_type == "smollm3":
        window |= {"use_sliding_window": True, "no_rope_layers": [1, 0], "layer_types": None}
    config = AutoConfig.for_model(model_type, **sizes, **window)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()


PACKED = [(name, "sdpa") for name, family in _FAMILIES.items() if family.packs and name != "gemma2"]


@pytest.mark.parametrize(("model_type", "attention"), [*PACKED, ("gemma2", "eager"), ("qwen3", "eager")])
def test_losses_and_gradients_are_those_of_samples_by_themselves(model_type: str, attention: str) -> None:
    model = language_model(model_type, attention)
    samples = []
    for number, length in enumerate((3, 17, 9, 1, 12, 20)):
        ids = toy.tokens(1, length + number)[0].tolist()
        samples.append({"input_ids": ids, "labels": ids if number % 2 else [*[IGNORED] * 3, *ids[3:]]})
    tokenizer = toy.tokenizer()
    loss, gradient = outcome(model, LanguageModelling(tokenizer, model), [samples])
    packed = LanguageModelling(tokenizer, model, packs=True)
    packed_loss, packed_gradient = outcome(model, packed, [[samples[:3], samples[3:]]])
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert toy.relative_error(packed_gradient, gradient) < 1e-5


def outcome(model: Any, objective: LanguageModelling, batches: Iterable[Any]) -> tuple[float, Tensor]:
    """The sum of the losses of all batches, and its gradient."""
    model.zero_grad()
    total = 0.0
    for samples in batches:
        batch = objective.placed(objective.prepared(objective.collator(samples)))
        loss = model(**batch, num_items_in_batch=7).loss
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_ranks_together_have_the_loss_and_gradient_of_the_unpacked_step() -> None:
    model, packing = language_model("llama", "sdpa"), Packing(lengths(), CAPACITY)
    samples = []
    for length in packing.lengths:
        ids = toy.tokens(1, length)[0].tolist()
        samples.append({"input_ids": ids, "labels": ids})

    def step(objective: LanguageModelling, plan: tuple[int, int], **rows: Any) -> tuple[float, Tensor]:
        """The first step of all ranks, one rank after the other; plan: ranks, and passes of each."""
        world, passes = plan
        filled = objective.with_filler(samples)
        ranks = (list(batches(world, 2, rank, **rows))[:passes] for rank in range(world))
        return outcome(model, objective, [[filled[i] for i in batch] for rank in ranks for batch in rank])

    tokenizer = toy.tokenizer()
    loss, gradient = step(LanguageModelling(tokenizer, model), (1, 6))
    for world in (1, 2, 3):
        plan = packed_plan(batches(world, 2), packing, steps=5, micro_batch_size=2)
        packed = LanguageModelling(tokenizer, model, packs=True, loss_chunk=5)
        passes = plan.accumulation_steps
        found = step(packed, (world, passes), packing=packing, passes=passes)
        assert found[0] == pytest.approx(loss, rel=1e-6) and toy.relative_error(found[1], gradient) < 1e-5


def test_pictures_go_with_the_row_of_their_sample(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(llava.model(tmp_path / "base"), dtype=torch.float32)
    token, count = model.config.image_token_id, (llava.SIDE // llava.PATCH) ** 2
    generator = torch.Generator().manual_seed(7)
    samples = []
    for number, (pictures, length) in enumerate([(1, 5), (0, 9), (2, 3), (1, 8)]):
        text = toy.tokens(1, length + number)[0].tolist()
        ids = [5, *[token] * count * pictures, *text]
        shown = [torch.randn(3, llava.SIDE, llava.SIDE, generator=generator) for _ in range(pictures)]
        samples.append({"input_ids": ids, "labels": [*[IGNORED] * (len(ids) - 3), *ids[-3:]], "pictures": shown})
    processor: Any = SimpleNamespace(tokenizer=toy.tokenizer(), size=(llava.SIDE, llava.SIDE))
    loss, gradient = outcome(model, PictureModelling(processor, model), [samples])
    packed = PictureModelling(processor, model, packs=True, loss_chunk=4)
    packed_loss, packed_gradient = outcome(model, packed, [[samples[:3], samples[3:]]])
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert toy.relative_error(packed_gradient, gradient) < 1e-5
    swapped = [{**samples[0], "pictures": samples[3]["pictures"]}, *samples[1:]]
    assert outcome(model, packed, [[swapped[:3], swapped[3:]]])[0] != pytest.approx(loss, rel=1e-4)


def test_lengths_reach_attention_that_reads_samples_one_by_one() -> None:
    """flash_attention_2 needs a GPU: here its arguments alone are looked at, as transformers names them."""
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

    model = language_model("llama", "sdpa")
    objective = LanguageModelling(toy.tokenizer(), model, packs=True)
    model.config._attn_implementation_internal = "flash_attention_2"
    batch = objective.placed(objective.collator([[{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]]))
    assert set(FlashAttentionKwargs.__annotations__) >= {*batch} - {"input_ids", "labels", "position_ids"}
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 8]
    assert batch["max_length_q"] == batch["max_length_k"] == 5
