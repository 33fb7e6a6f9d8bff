"""Learning rates of single modules: which parameter trains at which rate, by name."""

from typing import Any

import pytest
import torch
from torch import nn

from dora_dist.adapters.inject import by_pattern, inject
from dora_dist.adapters.layer import parameter_kinds
from dora_dist.adapters.methods import DynamicRank, Mora, WeightDecomposed
from dora_dist.runtime.errors import UserError
from dora_dist.training.rates import set_rates


@pytest.fixture
def model() -> nn.Module:
    """A frozen tower, a projector that is trained in full, and one of two layers."""
    parts = {"tower": nn.Linear(2, 2), "projector": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))}
    model = nn.ModuleDict({**parts, "layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    model["tower"].requires_grad_(False)
    model.get_submodule("layers.1").requires_grad_(False)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Weights with decay and biases without, as transformers groups them; all at 0.1."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.dim() > 1].append(parameter)
    decays = [{"params": groups[decayed], "weight_decay": 0.5 * decayed} for decayed in (True, False)]
    return torch.optim.AdamW(decays, lr=0.1)


def settings(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """(rate, weight decay) of every parameter that is optimized, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[tuple[str, Any]] = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    assert len(dict(found)) == len(found)  # each in one group
    return {name: (group["lr"], group["weight_decay"]) for name, group in found}


def test_a_pattern_moves_its_parameters_and_no_others(model: nn.Module) -> None:
    optimizer = optimizer_of(model)
    for _ in range(2):  # setting them again changes nothing
        set_rates(optimizer, model, {"projector": 0.02})
        assert settings(optimizer, model) == {
            "projector.0.weight": (0.02, 0.5),
            "projector.1.weight": (0.02, 0.5),
            "layers.0.weight": (0.1, 0.5),
            "projector.0.bias": (0.02, 0.0),
            "projector.1.bias": (0.02, 0.0),
            "layers.0.bias": (0.1, 0.0),
        }
        assert len(optimizer.param_groups) == 4


def test_the_later_pattern_holds_and_no_group_stays_empty(model: nn.Module) -> None:
    optimizer = optimizer_of(model)
    set_rates(optimizer, model, {".*": 0.3, "projector": 0.02, "projector.1": 0.01})
    rates = {name.removesuffix(".weight"): rate for name, (rate, _) in settings(optimizer, model).items()}
    assert (rates["projector.0"], rates["projector.1"], rates["layers.0"]) == (0.02, 0.01, 0.3)
    assert all(group["params"] for group in optimizer.param_groups)


def test_a_pattern_that_trains_nothing_is_refused(model: nn.Module) -> None:
    optimizer = optimizer_of(model)
    with pytest.raises(UserError, match=r"training.learning_rates: nothing in 'tower' is trained"):
        set_rates(optimizer, model, {"tower": 0.1})
    with pytest.raises(UserError, match=r"training.learning_rates: nothing in 'layers.1' is trained"):
        set_rates(optimizer, model, {"layers.1": 0.1})
    with pytest.raises(UserError, match=r"training.learning_rates: 'head' matches no module with parameters; .*tower"):
        set_rates(optimizer, model, {"head": 0.1})


def test_a_kind_is_the_same_parameter_of_every_adapter(model: nn.Module) -> None:
    inject(model, by_pattern(WeightDecomposed(DynamicRank(3, 6.0)), [".*"]))
    optimizer = optimizer_of(model)
    set_rates(optimizer, model, {"lora_B": 0.4, "lora_gates": 0.02, "magnitude_offset": 0.03, "tower": 0.01})
    rates = {name: rate for name, (rate, _) in settings(optimizer, model).items()}
    assert len(rates) == 5 * 4  # the tower's own rate, which is given last, holds for all of it
    for name, rate in rates.items():
        kind = {"lora_A": 0.1, "lora_B": 0.4, "lora_gates": 0.02, "magnitude_offset": 0.03}[name.rpartition(".")[2]]
        assert rate == (0.01 if name.startswith("tower") else kind)
    with pytest.raises(UserError, match=r"'vera_lambda_d' .*; kinds of adapter parameters: lora_A, lora_B, lora_gates"):
        set_rates(optimizer, model, {"vera_lambda_d": 0.1})


def test_kinds_are_what_the_methods_call_their_parameters(model: nn.Module) -> None:
    method = WeightDecomposed(Mora(1))
    inject(model, by_pattern(method, ["projector.0"], ["layers.0"]))
    kinds = parameter_kinds(model)
    assert list(kinds) == list(method.parameters((3, 2)))
    assert kinds["magnitude_offset"] == [
        model.get_parameter(f"{name}.magnitude_offset") for name in ("projector.0", "layers.0")
    ]
