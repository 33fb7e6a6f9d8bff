"""Cross entropy in chunks: the plain loss and gradients, with a chunk of logits in memory at a time."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_dist.data import IGNORED
from dora_dist.models import chunked_loss as chunks
from dora_dist.models.chunked_loss import chunked_loss, take_losses_in_chunks
from tests import toy
from tests.unit.test_packing import language_model

TOKENS, HIDDEN, WORDS = 23, 12, 301


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets (a third of them missing), weights of the tokens."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((TOKENS, HIDDEN), (WORDS, HIDDEN), WORDS)
    )
    targets = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    targets[::3] = IGNORED
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    return leaves[0], leaves[1], leaves[2], targets, torch.rand(TOKENS, generator=generator)


def by_formula(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, cap: float) -> Tensor:
    """Σ w_t · (log Σ_v exp z_tv − z_t,target), z the soft-capped logits in fp32."""
    logits = torch.tanh((hidden @ weight.T + bias) / cap) * cap
    logits, there = logits.float(), targets != IGNORED
    losses = logits.logsumexp(1) - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return (losses * weights * there).sum()


@pytest.mark.parametrize("rows", [1, 5, 23, 100])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_loss_and_gradients_are_those_of_the_formula(rows: int, dtype: torch.dtype, close: float) -> None:
    cap = 3.0
    hidden, weight, bias, targets, weights = given(dtype)
    expected = by_formula(hidden, weight, bias, targets, weights, cap)
    wanted = torch.autograd.grad(0.7 * expected, [hidden, weight, bias])
    loss = chunked_loss(
        hidden, weight, targets, weights, bias=bias, rows=rows, finish=lambda logits: torch.tanh(logits / cap) * cap
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=close)
    for found, gradient in zip(torch.autograd.grad(0.7 * loss, [hidden, weight, bias]), wanted, strict=True):
        assert found.dtype == dtype and toy.relative_error(found, gradient) < max(close, 2e-6)


def test_a_frozen_weight_gets_no_gradient_and_evaluation_makes_no_graph() -> None:
    hidden, weight, _, targets, _ = given()
    weight.requires_grad_(False)
    loss = chunked_loss(hidden, weight, targets, rows=4)
    loss.backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not chunked_loss(hidden, weight, targets, rows=4).requires_grad


def test_a_scale_between_two_numbers_of_bf16_is_not_rounded_to_one() -> None:
    hidden, weight, bias, targets, weights = given(torch.bfloat16)
    leaves = [hidden, weight, bias]
    between = 0.7011  # bf16 has 0.69922 and 0.70313
    loss = chunked_loss(hidden, weight, targets, weights, bias=bias, rows=5)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for found, gradient in zip(torch.autograd.grad(between * loss, leaves), once, strict=True):
        ours, of_one = found.double().flatten(), gradient.double().flatten()
        assert float(ours @ of_one / (of_one @ of_one)) == pytest.approx(between, abs=5e-4)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes, in bytes; a view is not made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    hidden, weight, _, targets, _ = (t.repeat(40, 1) if t.ndim == 2 and t.shape[0] == TOKENS else t for t in given())
    hidden, weight = hidden.detach().requires_grad_(), weight.detach()
    targets = targets.repeat(40)
    with Largest() as whole:
        F.cross_entropy(F.linear(hidden, weight), targets, ignore_index=IGNORED, reduction="sum").backward()
    with Largest() as chunked:
        chunked_loss(hidden, weight, targets, rows=40).backward()
    assert whole.bytes == 40 * TOKENS * WORDS * 4
    assert chunked.bytes == max(40 * WORDS * 4, hidden.numel() * 4)


def test_without_gradients_a_trained_weight_gets_no_memory_for_one() -> None:
    hidden, weight, bias, targets, _ = given()
    with torch.no_grad(), Largest() as seen:
        chunked_loss(hidden, weight, targets, bias=bias, rows=4)
    assert seen.bytes == 4 * WORDS * 4 < weight.numel() * 4


def outcome(model: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "gemma2", "granite", "smollm3"])
def test_models_have_the_loss_and_gradients_that_they_have_without(model_type: str) -> None:
    """Tied, trained embeddings among them; Gemma 2 caps its logits, Granite divides them."""
    model = language_model(model_type, "eager")
    if model_type == "gemma2":
        model.config.final_logit_softcapping = 0.5
    if model_type == "granite":
        model.config.logits_scaling = 3.0
    ids = toy.tokens(2, 19)
    kept, targets = torch.arange(3, 18), ids[:, 4:].contiguous()
    inputs = {"input_ids": ids, "labels": ids, "shift_labels": targets, "logits_to_keep": kept, "num_items_in_batch": 7}
    loss, gradient = outcome(model, **inputs)
    assert take_losses_in_chunks(model, 4)
    found, found_gradient = outcome(model, **inputs, targets=targets)
    assert float(found) == pytest.approx(float(loss), rel=1e-6)
    assert toy.relative_error(found_gradient, gradient) < 1e-5
    assert model(**inputs).logits.shape == (2, 15, 300)  # as ever where nobody asks for chunks


def test_auto_leaves_small_batches_to_the_bit_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("llama", "sdpa")
    ids = toy.tokens(2, 19)
    inputs = {"input_ids": ids, "labels": ids, "shift_labels": ids, "num_items_in_batch": 7}
    loss, gradient = outcome(model, **inputs)
    assert take_losses_in_chunks(model, "auto")
    found, found_gradient = outcome(model, **inputs, targets=ids)
    assert torch.equal(found, loss) and torch.equal(found_gradient, gradient)
    assert model(**inputs, targets=ids).logits is not None
    monkeypatch.setattr(chunks, "WHOLE_BYTES", 38 * 300 * 4 - 1)
    assert model(**inputs, targets=ids).logits is None


def test_an_adapted_or_unknown_output_layer_is_left_alone() -> None:
    model = language_model("llama", "sdpa")
    assert not take_losses_in_chunks(model, 0)
    model.config.model_type = "cohere"
    assert not take_losses_in_chunks(model, 4)
    model.config.model_type = "llama"
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    assert not take_losses_in_chunks(model, 4)
