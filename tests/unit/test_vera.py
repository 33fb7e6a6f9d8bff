"""VeRA's shared matrices: PEFT's numbers, in memory once, gone with the model."""

import gc
import weakref
from typing import Any

import pytest
import torch
from peft.tuners.vera.model import _kaiming_init
from torch import nn

from dora_dist.adapters.inject import by_pattern, inject
from dora_dist.adapters.layer import AdaptedLinear, adapted_layers
from dora_dist.adapters.methods import Vera, WeightDecomposed
from dora_dist.adapters.projection import Projection

R = 5


def model() -> Any:
    return nn.ModuleDict({"q": nn.Linear(16, 24), "up": nn.Linear(16, 40), "down": nn.Linear(40, 16)})


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
