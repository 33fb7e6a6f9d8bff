"""A whole model under activation checkpointing: what it recomputes, and that gradients do not know."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from dora_dist.adapters.held import HeldLinear
from dora_dist.adapters.inject import hold_frozen
from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.config import AdapterConfig, ModelConfig
from dora_dist.models.build import checkpoint_activations
from dora_dist.training.model import build_model
from tests import toy

Keep = Literal["none", "small", "all"]
KEEP: list[Keep] = ["none", "small", "all"]
TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.base_model(tmp_path_factory.mktemp("checkpointing") / "base")


def model_of(base: Path, storage: str, keep: Keep | None) -> Any:
    """With adapters on two projections, one of them narrow, and a bias-free weight that trains as it is."""
    adapter = AdapterConfig(
        r=2, target_modules=["q_proj", "v_proj"], dropout=0.1, trained_parameters=[".*layers.1.*up_proj.weight"]
    )
    model = build_model(ModelConfig(path=str(base), dtype="fp32", storage=storage), adapter).model
    model.enable_input_require_grads()
    if keep is not None:
        checkpoint_activations(model, keep)
    return model.train()


def gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)  # of dropout
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_gradients_are_those_without_checkpointing(base: Path, storage: str, keep: Keep) -> None:
    expected, found = gradients(model_of(base, storage, None)), gradients(model_of(base, storage, keep))
    assert found.keys() == expected.keys()
    assert any(name.endswith("up_proj.weight") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-8)


def test_a_bias_that_trains_beside_a_frozen_weight_goes_on_training() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2, bias=False))
    model.requires_grad_(False)
    model[0].bias.requires_grad_(True)
    hold_frozen(model)
    assert all(type(layer) is HeldLinear for layer in model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.bias"]
    model(torch.ones(1, 3)).sum().backward()
    assert model[0].bias.grad is not None


def test_selective_checkpointing_calls_no_frozen_layer_again(base: Path) -> None:
    called = {keep: calls(model_of(base, "plain", keep)) for keep in KEEP}
    frozen = [name for name in called["none"] if not name.endswith("1.mlp.up_proj")]
    assert len(frozen) == 2 * 7 - 1
    assert all(called["none"][name] == 2 for name in called["none"])
    assert {name for name in frozen if called["small"][name] == 1} == {n for n in frozen if n.endswith("v_proj")}
    assert all(called["all"][name] == 1 for name in frozen)
    assert called["all"]["model.layers.1.mlp.up_proj"] == 2  # it trains, so its product is not known


def calls(model: Any) -> dict[str, int]:
    """How often a step runs the hooks before the forward of each linear layer of the numbered ones."""
    times: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | HeldLinear | AdaptedLinear) and ".layers." in name:
            times[name] = 0

            def count(*_: object, name: str = name) -> None:
                times[name] += 1

            module.register_forward_pre_hook(count)
    gradients(model)
    return times
