"""Cross entropy over a large vocabulary whose logits are never all there at once.

Logits of t tokens over a vocabulary of v words are t·v numbers, in fp32 for the loss and again for its gradient: in
fine-tuning often the largest tensors of all. Here they are computed some tokens at a time, and at once turned into the
gradients of hidden states and weight, which is all that backward needs. Under ZeRO-3 the weight is gathered once for
all chunks: they are computed inside the forward of the module that holds it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import slice_logits_to_keep

from dora_dist.data import IGNORED
from dora_dist.models.families import family_of_model

Rows = int | Literal["auto"]

WHOLE_BYTES = 2**29
"""With "auto", logits that would be no larger in fp32 are computed whole."""
CHUNK_BYTES = 2**27
"""Logits in fp32 of a chunk with "auto"."""


@dataclass
class ChunkedOutput(CausalLMOutput):
    """A loss without logits, and token_losses (samples, places) fp32, the cross entropy at each target, else 0."""

    token_losses: Tensor | None = None


def take_losses_in_chunks(model: Any, rows: Rows) -> bool:
    """Have a model of transformers compute its loss in chunks of `rows` tokens where it is given `targets`, in place.

    Its forward then takes targets (samples, places) int64, -100 where there is none, one for each position that
    logits_to_keep keeps, and token_weights (samples, places) fp32 or None. It returns in `loss` the sum over targets of
    weight · cross entropy, divided by num_items_in_batch if that is given, and no logits (`ChunkedOutput`). "auto" does
    so only where the logits would be larger than WHOLE_BYTES, and else computes as without targets; 0: never. Returns
    whether anything was changed: nothing is where the output layer is adapted, or where it is not known what the model
    does with its logits (`Family.logits`).
    """
    if rows == 0:
        return False
    head, finish = model.get_output_embeddings(), family_of_model(model).logits
    if finish is None or type(head) is not nn.Linear:
        return False
    layer: Any = head  # whose forward is replaced
    plain_forward, plain_head = model.forward, layer.forward

    @functools.wraps(plain_head)
    def head_forward(
        hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None, losses: Tensor | None = None
    ) -> Tensor:
        if targets is None:
            logits: Tensor = plain_head(hidden)
            return logits
        count = max(CHUNK_BYTES // (4 * head.out_features), 1) if rows == "auto" else rows
        finished = functools.partial(finish, model)
        each = functools.partial(chunked_loss, bias=head.bias, rows=count, finish=finished, losses=losses)
        return each(hidden, head.weight, targets, weights)

    @functools.wraps(plain_forward)
    def forward(*args: Any, targets: Tensor | None = None, token_weights: Tensor | None = None, **inputs: Any) -> Any:
        if targets is None or (rows == "auto" and 4 * targets.numel() * head.out_features <= WHOLE_BYTES):
            return plain_forward(*args, **inputs)
        for name in ("labels", "shift_labels"):
            inputs.pop(name, None)
        items, kept = inputs.pop("num_items_in_batch", None), inputs.pop("logits_to_keep", 0)
        hidden = slice_logits_to_keep(model.base_model(*args, **inputs)[0], kept)
        losses = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
        loss = head(hidden, targets, token_weights, losses=losses)
        return ChunkedOutput(loss=loss if items is None else loss / items, token_losses=losses)

    model.forward, layer.forward = forward, head_forward
    return True


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    rows: int,
    finish: Callable[[Tensor], Tensor] = lambda logits: logits,
    losses: Tensor | None = None,
) -> Tensor:
    """The sum of weights · cross entropy of finish(hidden · weightᵀ + bias) and targets, fp32, `rows` tokens at a time.

    hidden (..., h); weight (v, h) and bias (v,), in hidden's dtype; targets (...) int64, -100 where there is none;
    weights (...) fp32, None: 1. `finish` maps logits (rows, v) to logits. Gradients are those of the plain form: of
    hidden, and of weight and bias where these are trained (added up in fp32). The cross entropy at each target, 0 where
    there is none, is written to `losses` (...) fp32, contiguous, if given.
    """
    each = None if weights is None else weights.flatten()
    into = None if losses is None else losses.view(-1)
    graph = torch.is_grad_enabled()  # inside of forward it never is
    given = (hidden.flatten(0, -2), weight, bias, targets.flatten(), each)
    loss: Tensor = _ChunkedLoss.apply(*given, rows, finish, graph, into)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are taken in forward, chunk by chunk, for a gradient of 1 of the loss; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        rows: int,
        finish: Callable[[Tensor], Tensor],
        graph: bool,
        losses: Tensor | None,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (graph and needed for needed in ctx.needs_input_grad[:3])
        # The leaves of each chunk's own small graph.
        w = weight.detach().requires_grad_(needs_weight)
        b = None if bias is None else bias.detach().requires_grad_(needs_bias)
        trained = [p for p in (w, b) if p is not None and p.requires_grad]
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        into = torch.empty_like(hidden) if needs_hidden else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for first in range(0, len(hidden), rows):
            here = slice(first, first + rows)
            with torch.set_grad_enabled(needs_hidden or bool(trained)):
                part = hidden[here].detach().requires_grad_(needs_hidden)
                logits = finish(F.linear(part, w, b))
                loss, each = _losses(logits, targets[here], None if weights is None else weights[here])
                del logits
            total += loss.detach()
            if losses is not None:
                losses[here] = each
            if not loss.requires_grad:
                continue
            gradients = torch.autograd.grad(loss, [*trained, *([part] if needs_hidden else [])])
            for of, gradient in zip(sums, gradients, strict=False):
                of += gradient
            if into is not None:
                into[here] = gradients[-1]
        found = iter(of.to(p.dtype) for of, p in zip(sums, trained, strict=True))
        ctx.save_for_backward(into, next(found) if needs_weight else None, next(found) if needs_bias else None)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (scale,) = gradients
        scaled = [None if of is None else _times(of, scale) for of in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None, None)


def _times(values: Tensor, scale: Tensor) -> Tensor:
    """values · scale (), in the dtype of values. The scale, fp32, is not: rounded, it would be off for all of them."""
    return torch.mul(values, scale.view(1), out=torch.empty_like(values))


def _losses(logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of weights · cross entropy, and each target's cross entropy (rows,), detached."""
    logarithms = F.log_softmax(logits.float(), dim=1)
    each = F.nll_loss(logarithms, targets, ignore_index=IGNORED, reduction="none")
    if weights is None:
        return F.nll_loss(logarithms, targets, ignore_index=IGNORED, reduction="sum"), each.detach()
    return (each * weights).sum(), each.detach()
