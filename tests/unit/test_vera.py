"""VeRA's shared matrices: PEFT's numbers, in memory once, gone with the model."""

import gc
import weakref
from typing import Any

import pytest
import torch
from peft.tuners.vera.model import _kaiming_init
from torch import Tensor, nn

from dora_dist.adapters.inject import by_pattern, inject
from dora_dist.adapters.layer import AdaptedLinear, adapted_layers
from dora_dist.adapters.methods import Vera, WeightDecomposed
from dora_dist.adapters.norms import NormRefresher
from dora_dist.adapters.projection import Projection
from tests import toy

R = 5


def model() -> Any:
    return nn.ModuleDict({"q": nn.Linear(16, 24), "up": nn.Linear(16, 40), "down": nn.Linear(40, 16)})


def toy_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**toy.SIZES, vocab_size=300))


@pytest.mark.parametrize("key", [0, 7])
def test_the_matrices_are_those_that_peft_draws(key: int) -> None:
    generator = torch.Generator("cpu").manual_seed(key)
    A, B = (_kaiming_init(shape, generator) for shape in ((R, 40), (24, R)))
    drawn = Projection.over([(16, 40), (24, 16)], key=key, r=R).drawn()
    assert torch.equal(drawn[0], A)
    assert torch.equal(drawn[1], B)


def projection_of(layer: AdaptedLinear) -> Projection:
    update: Any = layer.method.update if isinstance(layer.method, WeightDecomposed) else layer.method
    assert isinstance(update.projection, Projection)
    return update.projection


@pytest.mark.parametrize("decomposed", [False, True])
def test_all_layers_of_a_model_share_them(decomposed: bool) -> None:
    whole, update = model(), Vera(r=R)
    inject(whole, by_pattern(WeightDecomposed(update) if decomposed else update, ["q", "up", "down"]))
    layers = list(adapted_layers(whole).values())
    shared = projection_of(layers[0])
    assert len(layers) == 3
    assert all(projection_of(layer) is shared for layer in layers)
    assert shared.widest == (40, 40)
    places = {tuple(view.data_ptr() for view in shared.views(layer.shape, layer.weight)) for layer in layers}
    assert len(places) == 1
    assert not any(parameter.numel() >= 16 * R for layer in layers for parameter in layer.adapter_parameters().values())


def test_they_go_with_the_model() -> None:
    whole = model()
    inject(whole, by_pattern(Vera(r=R), ["q", "up", "down"]))
    whole.q(torch.ones(2, 16)).sum().backward()
    gone = weakref.ref(projection_of(whole.q))
    del whole
    gc.collect()
    assert gone() is None


class Decomposed(nn.Module):
    """A magnitude by hand over PEFT's VeRA layer: W = (m / n)·(W0 + ΔW), n detached (Liu et al., section 4.3)."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.theirs = theirs
        self.magnitude = nn.Parameter(theirs.base_layer.weight.norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        whole = self.theirs.base_layer.weight + self.theirs.get_delta_weight("default")
        return x @ ((self.magnitude / whole.norm(dim=1).detach())[:, None] * whole).T


@pytest.mark.parametrize("decomposed", [False, True])
def test_twenty_steps_follow_peft(decomposed: bool) -> None:
    from peft import VeraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    ours, theirs = toy_llama(), toy_llama()
    update = Vera(r=R, projection_prng_key=3)
    inject(ours, by_pattern(WeightDecomposed(update) if decomposed else update, targets))
    for layer in adapted_layers(ours).values():
        own = layer.adapter_parameters()
        for name, initial in layer.method.parameters(layer.shape).items():
            nn.init.constant_(own[name], initial.value)
    NormRefresher(ours)
    peft = get_peft_model(theirs, VeraConfig(r=R, target_modules=targets, projection_prng_key=3, save_projection=False))
    if decomposed:
        for name, module in list(peft.named_modules()):
            if hasattr(module, "get_delta_weight"):
                parent, _, child = name.rpartition(".")
                setattr(peft.get_submodule(parent), child, Decomposed(module))
    losses = []
    for whole in (ours, peft):
        trained = [p for p in whole.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
        for step in range(20):
            tokens = toy.tokens() + step % 3
            loss = whole(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:20] == pytest.approx(losses[20:], abs=1e-5)
    assert abs(losses[0] - losses[18]) > 1e-3
