"""Row norms from ZeRO-3 shards: exact at every world size, refreshed once per optimizer step, blind to padding."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dora_dist.weights.placement import in_place
from tests.mora_by_formula import change
from tests.ranks import run_ranks

SHAPES = [(11, 6), (6, 11), (1, 2), (3, 1), (64, 129)]  # cut rows, and ranks that hold nothing but padding
OTHERS = [(9, 8), (8, 10)]  # VeRA and MoRA, in what is recorded
R, ALPHA = 3, 5.0


class Chain(nn.Module):
    """Linear layers of odd shapes; the activations between them are cut or padded to fit."""

    def __init__(self, shapes: Sequence[tuple[int, int]] = SHAPES) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in shapes)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        for layer in self.layers:
            x = nn.functional.pad(x, (0, max(0, layer.in_features - x.shape[1])))[:, : layer.in_features]
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return x


def engine_json(persistence: int, accumulation: int, world_size: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * world_size,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persistence},
        "zero_allow_untested_optimizer": True,
    }


def place_everything(model: nn.Module, placement: Any, weights: dict[str, Tensor]) -> None:
    """Move a model's parameters into their place, base weights from `weights`, adapters with random values."""
    for name, parameter in list(model.named_parameters()):
        whole = weights.get(name)
        if whole is None:
            whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2

        def fill(start: int, stop: int, out: Tensor, whole: Tensor = whole) -> None:
            out.copy_(whole.flatten()[start:stop])

        [placed] = placement.place([parameter], parameter.numel(), in_place(fill))
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, placed)


def exact_norm(layer: Any) -> Tensor:
    """The definition, in fp64, from gathered parameters."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([layer.weight, layer.lora_A, layer.lora_B]):
        v = layer.weight.double() + layer.method.scaling * layer.lora_B.double() @ layer.lora_A.double().T
        return v.norm(dim=1)


def run(persistence: int) -> dict[str, Any]:
    """Train a chain for three steps on this rank; returns what the tests look at."""
    import deepspeed
    import torch.distributed as dist

    from dora_dist.adapters.inject import by_pattern, inject
    from dora_dist.adapters.methods import LowRank, WeightDecomposed
    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.placement import ShardedPlacement

    deepspeed.init_distributed("gloo", verbose=False)
    world_size = dist.get_world_size()
    torch.manual_seed(0)
    model = Chain()
    with torch.no_grad():
        model.layers[0].weight[2] = 0  # a zero row, and B is zero there too
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject(model, by_pattern(WeightDecomposed(LowRank(R, ALPHA)), [r"layers\.\d+"]))
    config = engine_json(persistence, 2, world_size)
    placement = ShardedPlacement(config)
    place_everything(model, placement, weights)
    for parameter in model.parameters():  # padding is uninitialised memory in general: make it poison
        valid = max(
            0,
            min(
                parameter.ds_numel - dist.get_rank() * parameter.ds_tensor.numel(),
                parameter.ds_tensor.numel(),
            ),
        )
        parameter.ds_tensor[valid:] = float("nan")
    norms = ShardedNormRefresher(model)
    norms.refresh()
    start = {"refreshes": norms.refreshes, "errors": errors(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    steps = []
    for _ in range(3):
        received, before = norms.bytes_received, norms.refreshes
        for _ in range(2):
            engine.backward(engine(torch.ones(4, 6), True).square().sum())
            engine.step()
        engine(torch.ones(4, 6))  # evaluation after the step sees the new norms
        steps.append(
            {
                "refreshes": norms.refreshes - before,
                "errors": errors(model),
                "bytes": norms.bytes_received - received,
            }
        )
    kept = [layer.norm for layer in model.layers]
    norms.record(norms.layers)
    unmoved = all(torch.equal(layer.norm, before) for layer, before in zip(model.layers, kept, strict=True))
    found = {"start": start, "steps": steps, "norms": kept, "unmoved": unmoved}
    return found | recorded(config)


def recorded(config: dict[str, Any]) -> dict[str, Any]:
    """Train layers of every kind for two steps, record them, and compare with the definition on whole weights."""
    import deepspeed
    from deepspeed import comm as dist
    from safetensors.torch import save_file

    from dora_dist.adapters.inject import inject
    from dora_dist.adapters.layer import adapted_layers
    from dora_dist.adapters.methods import DynamicRank, LowRank, Mora, NoUpdate, Vera, WeightDecomposed
    from dora_dist.analysis.decomposition import moved
    from dora_dist.runtime.errors import UserError
    from dora_dist.weights.safetensors_io import TensorFolder
    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.placement import ShardedPlacement
    from dora_dist.zero3.row_changes import TrainedWeight, row_changes

    torch.manual_seed(1)
    model = Chain([*SHAPES, *OTHERS])
    with torch.no_grad():
        model.layers[4].weight[2] = 0  # has no direction, until it is trained
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    kinds = [WeightDecomposed(LowRank(R, ALPHA)), LowRank(R, ALPHA), WeightDecomposed(DynamicRank(R, ALPHA))]
    methods = {f"layers.{i}": method for i, method in enumerate([*kinds, WeightDecomposed(NoUpdate())])}
    methods["layers.5"] = WeightDecomposed(Vera(R).for_model(OTHERS[:1]))
    methods["layers.6"] = WeightDecomposed(Mora(R, type=6))
    inject(model, lambda model: methods, ["layers.4"])
    place_everything(model, ShardedPlacement(config), weights)
    norms = ShardedNormRefresher(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(4):
        engine.backward(engine(torch.ones(4, 6)).square().sum())
        engine.step()
    before, refreshes = norms.bytes_received, norms.refreshes
    changes = norms.record(adapted_layers(model))
    received = norms.bytes_received - before
    engine(torch.ones(4, 6))
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, f"{folder}/model.safetensors")
        trained = {"layers.4": TrainedWeight(model.layers[4].weight, "layers.4.weight")}
        base = TensorFolder.open(Path(folder))
        changes |= row_changes(trained, base)
        if dist.get_rank() == dist.get_world_size() - 1:
            Path(folder, "model.safetensors").unlink()
        try:
            row_changes(trained, base)
            unreachable = ""
        except UserError as error:
            unreachable = str(error)
    return {
        "recorded": {name: tuple(found) for name, found in moved(changes).items()},
        "expected": {name: as_defined(model.get_submodule(name), weights[f"{name}.weight"]) for name in changes},
        "recording_bytes": received,
        "unreachable": unreachable,
        "recording_refreshes": norms.refreshes - refreshes,
    }


def as_defined(layer: Any, weight: Tensor) -> tuple[float, ...]:
    """What is recorded of a trained layer whose base is `weight` (out, in), from whole weights in fp64: ΔM and ΔD, the
    number of rows that have a direction, and their mean magnitude.
    """
    import deepspeed

    from dora_dist.adapters.projection import Projection
    from tests.unit.test_analysis import defined

    w0 = weight.double()
    with deepspeed.zero.GatheredParameters(list(layer.parameters())):
        own = {kind: p.detach().double() for kind, p in layer.named_parameters()}
    kept = w0.norm(dim=1) > 0
    v = own["weight"]
    if "lora_A" in own:
        v = w0 + ALPHA / R * (own["lora_B"] * own.get("lora_gates", 1)) @ own["lora_A"].T
    if "vera_lambda_d" in own:
        A, B = (drawn.double() for drawn in Projection.over(OTHERS[:1], key=0, r=R).drawn())
        v = w0 + own["vera_lambda_b"].diag() @ B @ own["vera_lambda_d"].diag() @ A
    if "mora_M" in own:
        v = w0 + change(layer.shape, own["mora_M"], kind=6)
    magnitude = w0.norm(dim=1) + own["magnitude_offset"] if "magnitude_offset" in own else v.norm(dim=1)
    return *defined(w0[kept], v[kept], magnitude[kept]), int(kept.sum()), float(magnitude[kept].mean())


def errors(model: Any) -> float:
    """Largest relative error of any row norm."""
    found = [(layer.norm.double() - exact) / exact for layer in model.layers for exact in [exact_norm(layer)]]
    return float(torch.cat([f.abs() for f in found]).max())


@pytest.fixture(scope="module", params=[(1, 0), (2, 0), (3, 0), (3, 100)], ids=lambda p: f"world{p[0]}-persist{p[1]}")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    world_size, persistence = request.param
    return run_ranks(run, world_size, persistence)


def test_norms_are_exact_at_the_start(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["start"]["errors"] <= 1e-6 for rank in ranks)
    assert all(rank["start"]["refreshes"] == 1 for rank in ranks)


def test_one_refresh_per_optimizer_step_whatever_accumulates_or_recomputes(
    ranks: list[dict[str, Any]],
) -> None:
    assert all([step["refreshes"] for step in rank["steps"]] == [1, 1, 1] for rank in ranks)


def test_norms_are_never_stale(ranks: list[dict[str, Any]]) -> None:
    assert all(step["errors"] <= 1e-6 for rank in ranks for step in rank["steps"])


def test_norms_are_the_same_bits_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rank["norms"], ranks[0]["norms"], strict=True))


def test_what_is_recorded_is_what_whole_weights_say(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["recorded"].keys() == rank["expected"].keys()
        for name, expected in rank["expected"].items():
            # Layer 2 has one row of two: ΔW is nearly along W0, and what turns it is a small difference of sums.
            assert rank["recorded"][name] == pytest.approx(expected, rel=1e-6, abs=1e-9), name
        assert rank["recorded"] == ranks[0]["recorded"]


def test_a_base_that_one_rank_cannot_read_ends_a_recording_on_all(ranks: list[dict[str, Any]]) -> None:
    assert all("(model.path) back where it was, or set analysis.every to 0" in rank["unreachable"] for rank in ranks)


def test_recording_takes_the_place_of_a_refresh_and_moves_no_norm(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["unmoved"]
        assert rank["recording_refreshes"] == 1  # none for the forward that came after it
        adapted = [*SHAPES[:4], *OTHERS]
        with_norms = sum(o for i, (o, _) in enumerate(adapted) if i != 1)
        sums = 4 * (with_norms + 2 * sum(o for o, _ in adapted)) + 4 * SHAPES[1][0]  # LoRA's rowsum(W0²), once
        factors = 4 * sum(R * (o + i) + R + o for o, i in adapted)
        assert sums <= rank["recording_bytes"] <= sums + factors


def test_communication_is_one_number_per_row_plus_the_factors(ranks: list[dict[str, Any]]) -> None:
    rows, factors = sum(o for o, _ in SHAPES), sum(R * (o + i) for o, i in SHAPES)
    for rank in ranks:
        for step in rank["steps"]:
            assert 4 * rows <= step["bytes"] <= 4 * (rows + factors)
