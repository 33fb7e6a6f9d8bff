"""Methods of the package over shards: norms, losses, resuming, merging; each with and without a magnitude over it.

A method that is added here brings its ΔW as its paper has it. All share the ranks, which take longer to start than to
train.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_dist.adapters.method import AdapterMethod, registered
from dora_dist.adapters.methods import WeightDecomposed
from dora_dist.adapters.projection import Projection
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.evaluation.inference import load_for_inference
from tests import toy
from tests.distributed import test_norms, training_runs
from tests.distributed.training_runs import config, metrics
from tests.ranks import run_ranks

R = 6


def vera_delta(own: dict[str, Tensor], shape: tuple[int, int], shapes: list[tuple[int, int]]) -> Tensor:
    A, B = Projection.over(shapes, key=7, r=R).drawn()
    d, b = own["vera_lambda_d"].double(), own["vera_lambda_b"].double()
    return b.diag() @ B[: shape[0]].double() @ d.diag() @ A[:, : shape[1]].double()


METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[..., Tensor]]] = {
    "vera": ({"projection_prng_key": 7}, {"learning_rate": 0.03}, vera_delta),
}
"""By name in configurations: settings, what else training needs, and ΔW in fp64 of a layer's parameters."""
RECIPES = {"llama7b_dvora": {"adapter.r": 8}, "llama2_7b_mora": {}, "llama7b_full": {}}
"""And what makes each small, besides what does so for all."""
RUNS = [f"{over}{name}" for name in METHODS for over in ("", "d-")]


def norm_errors(name: str) -> float:
    """Largest relative error of a row norm from this rank's shards, against the definition in fp64."""
    import deepspeed
    import torch.distributed as dist

    from dora_dist.adapters.inject import by_pattern, inject
    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.placement import ShardedPlacement

    kind: Any = registered()[name]
    settings, _, delta = METHODS[name]
    method: AdapterMethod = WeightDecomposed(kind(r=R, **settings))
    model: Any = test_norms.Chain()
    weights = {own: p.detach().clone() for own, p in model.named_parameters()}
    inject(model, by_pattern(method, [r"layers\.\d+"]))
    placement = ShardedPlacement(test_norms.engine_json(0, 1, dist.get_world_size()))
    test_norms.place_everything(model, placement, weights)
    ShardedNormRefresher(model).refresh()
    errors = []
    for index, layer in enumerate(model.layers):
        parameters = layer.adapter_parameters()
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            own = {kind: p.detach().clone() for kind, p in parameters.items()}
        base = weights[f"layers.{index}.weight"].double()
        exact = (base + delta(own, layer.shape, test_norms.SHAPES)).norm(dim=1)
        errors.append(float(((layer.norm.double() - exact) / exact).abs().max()))
    return max(errors)


def norms_and_runs(recipes: dict[str, list[str]], *configurations: dict[str, Any]) -> dict[str, float]:
    """On a rank: errors of norms by method, and whole runs."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    found = {name: norm_errors(name) for name in METHODS}
    training_runs.run(*configurations)
    training_runs.train_recipes(recipes)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.training_folder(tmp_path_factory.mktemp("methods"))


def scaled_down(folder: Path, name: str) -> list[str]:
    """Overrides with which a recipe is two steps of a toy."""
    places = {"model.path": folder / "base", "data.train": folder / "data.json", "checkpoint.run_dir": folder / name}
    small = {"data.validation_samples": 2, "training.global_batch_size": 4, "training.eval_every": 2, **RECIPES[name]}
    return training_runs.options({**places, **small, "training.max_steps": 2, "logging.every": 1})


@pytest.fixture(scope="module")
def errors(folder: Path) -> list[dict[str, float]]:
    """Every run at 1, 2 and 3 ranks, at 2 also resumed; errors of norms on every rank."""

    def described(run: str, world: str, resume: str | None = None) -> dict[str, Any]:
        name = run.removeprefix("d-")
        settings, training, _ = METHODS[name]
        adapter = {"method": name, "settings": settings, "r": R, "weight_decomposed": run != name}
        place = folder / f"{run}-{world}"
        changes: dict[str, Any] = {"adapter": adapter, "training": training, "checkpoint": {"resume": resume}}
        return config(folder / "base", folder / "data.json", place, **changes)

    found = []
    for ranks in (1, 2, 3):
        runs, recipes = [described(run, str(ranks)) for run in RUNS], {}
        if ranks == 2:
            recipes = {name: scaled_down(folder, name) for name in RECIPES}
            runs += [described(run, "on", str(folder / f"{run}-2" / "checkpoint-3")) for run in RUNS]
        found += run_ranks(norms_and_runs, ranks, recipes, *runs)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_norms_from_shards_are_exact(errors: list[dict[str, float]], name: str) -> None:
    assert len(errors) == 6
    assert max(rank[name] for rank in errors) <= 1e-6


@pytest.mark.parametrize("run", RUNS)
def test_losses_do_not_know_how_many_ranks_there_are(errors: Any, folder: Path, run: str) -> None:
    one, two, three = (metrics(folder / f"{run}-{world}")["losses"] for world in (1, 2, 3))
    assert list(one) == [1, 2, 3, 4, 5, 6]
    assert two == pytest.approx(one, abs=1e-5)
    assert three == pytest.approx(one, abs=1e-5)
    assert abs(one[6] - one[1]) > 1e-3  # it trains


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(errors: Any, folder: Path, run: str) -> None:
    whole, resumed = (folder / f"{run}-{world}" for world in ("2", "on"))
    losses = metrics(whole)["losses"]
    assert metrics(resumed)["losses"] == {step: losses[step] for step in (4, 5, 6)}
    states = [load_file(place / "checkpoint-6" / "state.safetensors") for place in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())


@pytest.mark.parametrize("run", RUNS)
def test_the_merged_model_computes_what_the_adapted_one_does(errors: Any, folder: Path, run: str) -> None:
    checkpoint, merged = folder / f"{run}-3" / "checkpoint-6", folder / f"{run}-merged"
    consolidate(checkpoint / "adapter", folder / "base", merged, progress=False)
    tokens = toy.tokens()
    with torch.no_grad():
        logits = [load_for_inference(str(place), "fp32")[0](tokens).logits for place in (checkpoint, merged)]
        plain = load_for_inference(str(folder / "base"), "fp32")[0](tokens).logits
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
    assert (logits[0] - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train(errors: Any, folder: Path, name: str) -> None:
    found = metrics(folder / name)
    assert list(found["losses"]) == [1, 2]
    assert list(found["eval"]) == [2]
