"""The loss of each source of a mixture, against cross entropy over its tokens alone."""

import pytest
import torch
from transformers.utils import ModelOutput

from dora_dist.data import IGNORED
from dora_dist.tasks.objectives.language import LanguageModelling
from dora_dist.training.source_losses import KEY, SourceLosses, WithSources
from tests import toy
from tests.unit.test_packing import language_model


def test_each_source_has_the_mean_loss_of_its_own_tokens() -> None:
    objective, generator = LanguageModelling(toy.tokenizer(), None), torch.Generator().manual_seed(1)
    found = SourceLosses(["a", "b", "never"])
    all_logits, all_labels, all_sources = [], [], []
    for step in range(3):
        logits = torch.randn(4, 5, 11, generator=generator)
        labels = torch.randint(0, 11, (4, 5), generator=generator)
        labels[0, : 2 + step] = labels[3] = IGNORED
        sources = torch.tensor([0, 1, 1, -1])
        found.add(objective.row_losses(ModelOutput(logits=logits), {"shift_labels": labels}), sources)
        all_logits.append(logits)
        all_labels.append(labels)
        all_sources.append(sources)
    logits, labels, sources = torch.cat(all_logits), torch.cat(all_labels), torch.cat(all_sources)
    settled = found.settle(torch.device("cpu"))
    assert list(settled) == ["loss/a", "learnt/a", "loss/b", "learnt/b"]
    for number, name in enumerate(["a", "b"]):
        of = sources == number
        expected = torch.nn.functional.cross_entropy(logits[of].flatten(0, 1), labels[of].flatten())
        assert settled[f"loss/{name}"] == pytest.approx(float(expected), rel=1e-6)
        assert settled[f"learnt/{name}"] == int((labels[of] != IGNORED).sum())
    assert found.settle(torch.device("cpu")) == {}


def test_a_model_that_returns_its_loss_alone_says_nothing_of_sources() -> None:
    objective, found = LanguageModelling(toy.tokenizer(), None), SourceLosses(["a"])
    batch = {"shift_labels": torch.zeros(1, 2, dtype=torch.int64)}
    found.add(objective.row_losses(ModelOutput(loss=torch.zeros(())), batch), torch.tensor([0]))
    assert found.settle(torch.device("cpu")) == {}


def test_losses_in_chunks_are_those_of_the_same_rows() -> None:
    """As in a step: chunks begin within rows, and the sum of all is what is minimised."""
    model, ids = language_model("llama", "sdpa"), toy.tokens(3, 12)
    labels = ids.clone()
    labels[0, :7] = labels[2] = IGNORED
    batch = {"input_ids": ids, "labels": labels}
    plain = LanguageModelling(toy.tokenizer(), model)
    prepared = plain.prepared(batch)
    wanted = plain.row_losses(model(**prepared, num_items_in_batch=1), prepared)
    chunked = LanguageModelling(toy.tokenizer(), model, loss_chunk=5)
    prepared = chunked.prepared(batch)
    outputs = model(**prepared, num_items_in_batch=1)
    found = chunked.row_losses(outputs, prepared)
    assert outputs.logits is None and wanted is not None and found is not None
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0)
    assert torch.equal(found[1], wanted[1]) and found[0][2] == 0
    assert not found[0].requires_grad and float(found[0].sum()) == pytest.approx(float(outputs.loss.detach()))


def test_batches_say_the_source_of_each_row() -> None:
    collate = WithSources(LanguageModelling(toy.tokenizer(), None).collator)
    sample = {"input_ids": [1, 2], "labels": [1, 2]}
    assert collate([{**sample, "source": 1}, sample])[KEY].tolist() == [1, -1]


@pytest.mark.parametrize("chunk", [0, 5])
def test_sources_that_share_rows_have_the_losses_that_they_have_alone(chunk: int) -> None:
    model, tokenizer, device = language_model("llama", "sdpa"), toy.tokenizer(), torch.device("cpu")
    samples = [
        {"input_ids": ids.tolist(), "labels": [IGNORED, IGNORED, *ids[2:].tolist()], "source": k % 2}
        for k, ids in enumerate(toy.tokens(5, 9))
    ]
    samples = [{**each, **{of: each[of][: 5 + k] for of in ("input_ids", "labels")}} for k, each in enumerate(samples)]
    settled = []
    for packs, rows in ((False, samples), (True, [samples[:2], samples[2:4], samples[4:]])):
        objective, found = LanguageModelling(tokenizer, model, packs=packs, loss_chunk=chunk), SourceLosses(["a", "b"])
        batch = objective.placed(objective.prepared(WithSources(objective.collator)(rows)))
        sources = batch.pop(KEY)
        outputs = model(**batch, num_items_in_batch=1)
        found.add(objective.row_losses(outputs, batch), objective.sources(sources, batch))
        settled.append(found.settle(device))
    assert settled[1] == pytest.approx(settled[0], rel=1e-5) and settled[0]["learnt/a"] > settled[0]["learnt/b"] > 0
