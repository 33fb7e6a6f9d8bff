"""Importance, budget, pruning and penalty of single-rank components, against their definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dora_dist.adapters.components import Budget, ComponentPruner
from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.methods import DynamicRank, WeightDecomposed, chosen
from dora_dist.adapters.norms import NormRefresher
from dora_dist.config.adapter import AdapterConfig
from tests.toy import relative_error

START_R, R, ALPHA = 6, 4, 8.0
SHAPES = [(7, 11), (11, 5), (5, 7)]
STEPS = 60


class Chain(nn.Module):
    """Gated layers with a non-linearity between them."""

    def __init__(self, weight_decomposed: bool, init: Any = "paper") -> None:
        super().__init__()
        torch.manual_seed(0)
        update = DynamicRank(START_R, ALPHA, init)
        method = WeightDecomposed(update) if weight_decomposed else update
        self.layers = nn.ModuleList(AdaptedLinear.from_linear(nn.Linear(i, o), method) for i, o in SHAPES)
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.ndim > 0)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model))


def brute_force(layer: Any) -> Tensor:
    """The definition of importance, with every component's matrix built, fp64."""
    a, b, c = layer.lora_A.detach().double(), layer.lora_B.detach().double(), layer.lora_gates.detach().double()
    parts = torch.stack([c[i] * torch.outer(b[:, i], a[:, i]) for i in range(len(c))])
    return torch.stack([part.norm() for part in parts]) / (parts.sum(0).norm() + 1e-8)


def variance(layer: Any) -> Tensor:
    """Σ_i Var(A_i) + Var(B_i), differentiable."""
    return layer.lora_A.var(0).sum() + layer.lora_B.var(0).sum()


def test_scores_are_the_definitions() -> None:
    model = Chain(weight_decomposed=False)
    with torch.no_grad():
        for layer in model.layers:
            layer.lora_gates.normal_()
    pruner = ComponentPruner(model, sgd(model), Budget(R, START_R, 9, 30, 5))
    for name, sums in pruner.layer_sums().items():
        layer = model.get_submodule(name)
        assert relative_error(sums.importance(), brute_force(layer)) <= 1e-6
        assert sums.spread() == pytest.approx(float(variance(layer).detach()), rel=1e-5)


def test_gates_of_zero_have_no_importance() -> None:
    model = Chain(weight_decomposed=False)
    sums = ComponentPruner(model, sgd(model), Budget(R, START_R, 9, 30, 5)).layer_sums()
    assert all(layer.importance().tolist() == [0.0] * START_R for layer in sums.values())


@pytest.mark.parametrize(("schedule", "middle"), [("dora", 0.125), ("adalora", 0.875)])
def test_the_budget_falls_as_the_schedule_says(schedule: Any, middle: float) -> None:
    budget = Budget.of_run(8, 12, 200, every=10, schedule=schedule)
    assert (budget.first, budget.last) == (30, 100)
    assert [step for step in range(1, 201) if budget.prunes_at(step)] == [30, 40, 50, 60, 70, 80, 90, 100]
    assert budget.pruned(30, 1200) == 1  # at least one
    assert budget.pruned(65, 1200) == int(400 * middle)
    assert budget.pruned(100, 1200) == 400
    assert Budget.of_run(8, 12, 190, every=10, schedule=schedule).prunes_at(95)  # the window's end, off the beat


def test_the_last_pruning_is_exact_whatever_the_sizes() -> None:
    for r in range(1, 40):
        start_r = -(-3 * r // 2)
        for layers in (1, 7, 72, 224):
            assert Budget(r, start_r, 3, 10, 2).pruned(10, layers * start_r) == layers * (start_r - r)


def test_windows_without_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="steps 0 to 1 of 3, is shorter than 10 steps"):
        Budget.of_run(4, 6, 3, every=10, schedule="dora")
    with pytest.raises(ValueError, match="steps 0 to 0 of 1, is empty"):
        Budget.of_run(4, 6, 1, every=10, schedule="dora")


def test_components_start_as_the_paper_says_or_as_lora_does() -> None:
    for init, gate in (("paper", 0.0), ("lora", 1.0)):
        for (in_features, _), layer in zip(SHAPES, Chain(weight_decomposed=False, init=init).layers, strict=True):
            assert isinstance(layer, AdaptedLinear)
            bounds = {"lora_A": (6 / in_features) ** 0.5, "lora_B": (6 / START_R) ** 0.5}  # kaiming_uniform(a=0)
            if init == "lora":  # kaiming_uniform(a=sqrt(5)), and 0
                bounds = {"lora_A": in_features**-0.5, "lora_B": 0.0}
            own = layer.adapter_parameters()
            assert own["lora_gates"].tolist() == [gate] * START_R
            for name, bound in bounds.items():
                assert 0.8 * bound <= own[name].abs().max() <= bound
            x = torch.randn(3, in_features)
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_the_scale_is_alpha_over_the_components_at_the_start_or_over_the_budget() -> None:
    for decomposed in (False, True):
        section: dict[str, Any] = {"weight_decomposed": decomposed, "dynamic_rank": True, "r": 4, "lora_alpha": 8.0}
        paper = chosen(AdapterConfig(**section, component_scale="paper"))
        budget = chosen(AdapterConfig(**section))
        for method, scaling in ((paper, 8 / 6), (budget, 8 / 4)):
            assert isinstance(method, DynamicRank | WeightDecomposed)
            assert method.r == 6
            assert method.scaling == pytest.approx(scaling)
            left = method.resized(3)
            assert left is not None and left.scaling == pytest.approx(scaling)  # what pruning leaves does not jump


def reference_run(weight_decomposed: bool, dem: float, init: Any) -> list[dict[str, Any]]:
    """methods.md parts 2 and 3 as they read, in fp64 with autograd: what each step leaves."""
    model = Chain(weight_decomposed, init)
    layers = [
        {
            "w": layer.weight.double(),
            "bias": layer.bias.double(),
            "A": layer.lora_A.detach().double().T.clone().requires_grad_(),  # (r, in), as in the paper
            "B": layer.lora_B.detach().double().clone().requires_grad_(),
            "c": layer.lora_gates.detach().double().clone().requires_grad_(),
            "offset": torch.zeros(len(layer.weight), dtype=torch.float64).requires_grad_(weight_decomposed),
        }
        for layer in model.layers
    ]
    leaves = [layer[key] for layer in layers for key in ("A", "B", "c", "offset") if layer[key].requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=1e-2, weight_decay=0.01)
    scores = [torch.zeros(START_R, dtype=torch.float64) for _ in layers]
    components = len(layers) * START_R
    first, last, every = int(0.15 * STEPS), int(0.5 * STEPS), 4
    mask = torch.zeros(components, dtype=torch.bool)
    history = []
    for step in range(1, STEPS + 1):
        x, target = batch(step)
        hidden = x.double()
        for layer in layers:
            v = layer["w"] + ALPHA / START_R * layer["B"] @ layer["c"].diag() @ layer["A"]
            if weight_decomposed:
                magnitude = layer["w"].norm(dim=1) + layer["offset"]
                v = (magnitude / v.norm(dim=1).detach())[:, None] * v
            hidden = torch.tanh(hidden @ v.T + layer["bias"])
        loss = (hidden - target.double()).square().mean()
        if step <= last:
            spread = torch.stack([layer["A"].var(1).sum() + layer["B"].var(0).sum() for layer in layers]).sum()
            loss = loss + dem * spread / components
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if step <= last:
                for score, layer in zip(scores, layers, strict=True):
                    parts = [layer["c"][i] * torch.outer(layer["B"][:, i], layer["A"][i]) for i in range(START_R)]
                    whole = sum(parts).norm() + 1e-8
                    score.mul_(0.9).add_(0.1 * torch.stack([part.norm() for part in parts]) / whole)
            if first <= step <= last and (step % every == 0 or step == last):
                rate = (START_R - R) / START_R * ((step - first) / (last - first)) ** 3
                lowest = torch.cat(scores).argsort()[: max(int(rate * components + 1e-9), 1)]
                mask = torch.zeros(components, dtype=torch.bool)
                mask[lowest] = True
            if (first <= step <= last and (step % every == 0 or step == last)) or step > last:
                for layer, pruned in zip(layers, mask.split(START_R), strict=True):
                    layer["c"][pruned] = 0
        gates = torch.cat([layer["c"].detach() for layer in layers])
        history.append({"kept": int((gates != 0).sum()), "open": (gates != 0).tolist(), "gates": gates.clone()})
    return history


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, SHAPES[0][0], generator=generator)
    return x, torch.tanh(x[:, :1] - x[:, 1:2]).expand(-1, SHAPES[-1][1])


@pytest.mark.parametrize("weight_decomposed", [False, True])
@pytest.mark.parametrize("dem", [0.0, 0.5])
@pytest.mark.parametrize(("init", "backwards"), [("paper", 1), ("paper", 2), ("lora", 2)])
def test_a_run_follows_the_plain_reference_step_by_step(
    weight_decomposed: bool, dem: float, init: str, backwards: int
) -> None:
    model = Chain(weight_decomposed, init)
    if weight_decomposed:
        NormRefresher(model)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.01)
    budget = Budget.of_run(R, START_R, STEPS, every=4, schedule="dora")
    pruner = ComponentPruner(model, optimizer, budget, dem=dem, backwards=backwards)
    for step, expected in enumerate(reference_run(weight_decomposed, dem, init), start=1):
        x, target = batch(step)
        for part, wanted in zip(x.chunk(backwards), target.chunk(backwards), strict=True):
            ((model(part) - wanted).square().mean() / backwards).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.settle()
        gates = torch.cat([layer.lora_gates.detach() for layer in model.layers])
        assert (gates != 0).tolist() == expected["open"], step
        torch.testing.assert_close(gates.double(), expected["gates"], rtol=1e-3, atol=1e-5)
    assert [event.step for event in pruner.events] == [12, 16, 20, 24, 28, 30]
    assert pruner.events[-1].kept == len(SHAPES) * R
    assert pruner.events[-1].final


def test_nobody_has_to_call_it_and_evaluation_does_not_count() -> None:
    model = Chain(weight_decomposed=True)
    norms = NormRefresher(model)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    pruner = ComponentPruner(model, optimizer, Budget(R, START_R, 1, 3, 1))
    for step in range(1, 6):
        model(batch(step)[0]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(batch(step)[0])
            model(batch(step)[0])
        assert pruner.step == step
        for layer in model.layers:  # norms are those of what pruning left
            gated_B = layer.lora_B.double() * layer.lora_gates.double()
            v = layer.weight.double() + layer.method.scaling * gated_B @ layer.lora_A.double().T
            assert relative_error(layer.norm, v.norm(dim=1)) <= 1e-6
    assert norms.refreshes == 6


def test_after_the_final_mask_gates_cannot_drift_back() -> None:
    model = Chain(weight_decomposed=False)
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    pruner = ComponentPruner(model, optimizer, Budget(R, START_R, 1, 3, 1), clear_moments=True)
    for step in range(1, 54):
        model(batch(step)[0]).square().sum().backward()
        optimizer.step()
        pruner.settle()
        if step >= 3:
            for layer, pruned in zip(model.layers, pruner.pruned.values(), strict=True):
                assert not layer.lora_gates.detach()[pruned].any()
                assert not optimizer.state[layer.lora_gates]["exp_avg"][pruned].any()
    assert sum(int(pruned.sum()) for pruned in pruner.pruned.values()) == len(SHAPES) * (START_R - R)


def test_a_state_carries_over() -> None:
    model = Chain(weight_decomposed=False)
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    first, second = (ComponentPruner(model, optimizer, Budget(R, START_R, 1, 3, 1), dem=0.5) for _ in range(2))
    model(batch(0)[0]).sum().backward()
    optimizer.step()
    first.settle()
    second.load(first.step, first.scores, first.pruned)
    assert second.step == 1
    assert all(torch.equal(second.scores[name], first.scores[name]) for name in first.scores)
    second.load(3, first.scores, first.pruned)
    assert {layer.dem_weight for layer in model.layers} == {0.0}  # no penalty once the mask is final
