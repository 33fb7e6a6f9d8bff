"""MoRA on shards: losses and norms at worlds 1, 2 and 3, resumed, merged, and taken up from its own adapter folder."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from dora_dist.adapters.folders import is_native, read_adapter
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.evaluation.inference import load_for_inference
from tests import toy
from tests.distributed import training_runs
from tests.distributed.training_runs import config, metrics
from tests.mora_by_formula import change
from tests.ranks import run_ranks

KINDS: dict[str, dict[str, Any]] = {
    "sharing": {"settings": {"type": 1}, "weight_decomposed": False},
    "over-rotation": {"settings": {"type": 6}, "norm_gradient": "full"},
    "over-sharing": {"settings": {"type": 1}, "norm_gradient": "full"},
    "rotation": {"settings": {"type": 6}, "weight_decomposed": False},
}
RESUMED = ("over-rotation", "sharing")

R = 3  # the layers here have an even r̂ then, so that both types have the same matrices


def run(*configurations: dict[str, Any]) -> list[float]:
    """Train on this rank; returns the largest relative error of a row norm after each run, by both types."""
    from dora_dist.training.trainer import DoraTrainer

    errors: list[float] = []
    train = DoraTrainer.train

    def measured(trainer: Any, *args: Any, **options: Any) -> Any:
        result = train(trainer, *args, **options)
        trainer.wait_for_saving()  # the last checkpoint describes the layers' methods, which are exchanged below
        norms = trainer.run.norms
        own = {layer: layer.method for layer in norms.layers.values()}
        errors.append(max(norm_error(norms, kind) for kind in (1, 6)) if own else 0.0)
        for layer, method in own.items():
            layer.method = method
        norms.refresh()
        return result

    with patch.object(DoraTrainer, "train", measured):
        training_runs.run(*configurations)
    return errors


def norm_error(norms: Any, kind: int) -> float:
    import deepspeed

    from dora_dist.adapters.methods import Mora, WeightDecomposed

    for layer in norms.layers.values():
        layer.method = WeightDecomposed(Mora(r=R, type=kind))
    norms.refresh()
    found = []
    for layer in norms.layers.values():
        with deepspeed.zero.GatheredParameters([layer.weight, layer.mora_M]):
            exact = (layer.weight.double() + change(layer.shape, layer.mora_M.detach().double(), kind)).norm(dim=1)
        found.append(float(((layer.norm.double() - exact) / exact).abs().max()))
    return max(found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[list[float]]]]:
    """Every kind at each world; two resumed on two ranks, and one started from another's adapter on three."""
    folder = toy.training_folder(tmp_path_factory.mktemp("mora"))

    def described(kind: str, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
        adapter = {"method": "mora", "r": R, **KINDS[kind], **changes.pop("adapter", {})}
        return config(folder / "base", folder / "data.json", folder / name, adapter=adapter, **changes)

    def resumed(kind: str) -> dict[str, Any]:
        checkpoint = {"resume": str(folder / f"{kind}-2" / "checkpoint-3")}
        return described(kind, f"{kind}-resumed", checkpoint=checkpoint)

    start = {"init_from": str(folder / "over-rotation-2" / "checkpoint-6" / "adapter")}
    still: dict[str, Any] = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-30}
    further = {
        2: [resumed(kind) for kind in RESUMED],
        3: [described("over-rotation", "taken-up", adapter=start, training=still)],
    }
    errors = {
        world: run_ranks(run, world, *(described(kind, f"{kind}-{world}") for kind in KINDS), *further.get(world, []))
        for world in (1, 2, 3)
    }
    return folder, errors


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_same_at_every_world_size(trained: Any, kind: str) -> None:
    one, *others = (metrics(trained[0] / f"{kind}-{world}")["losses"] for world in (1, 2, 3))
    assert list(one) == [1, 2, 3, 4, 5, 6]
    assert abs(one[6] - one[1]) > 1e-3  # it trains
    for losses in others:
        assert losses == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_norms_from_shards_are_those_of_the_whole_weight(trained: Any, world: int) -> None:
    assert all(max(errors) <= 1e-6 for errors in trained[1][world])
    for errors in trained[1][world]:  # measured, in runs with magnitudes
        found = dict(zip(KINDS, errors, strict=False))
        assert all((found[kind] > 0) == kind.startswith("over-") for kind in KINDS)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_goes_on_bit_for_bit(trained: Any, kind: str) -> None:
    runs = [trained[0] / name for name in (f"{kind}-2", f"{kind}-resumed")]
    whole, resumed = (metrics(run)["losses"] for run in runs)
    assert resumed == {step: whole[step] for step in (4, 5, 6)}
    states = [load_file(run / "checkpoint-6" / "state.safetensors") for run in runs]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())


def test_a_run_takes_up_an_adapter_of_our_own_format(trained: Any) -> None:
    adapters = [
        load_file(trained[0] / name / "adapter" / "adapter.safetensors")
        for name in ("over-rotation-2/checkpoint-6", "taken-up/checkpoint-1")
    ]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(values, adapters[1][name]) for name, values in adapters[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unmerged_are_the_formula(trained: Any, kind: str, tmp_path: Path) -> None:
    folder = trained[0]
    adapter = folder / f"{kind}-2" / "checkpoint-6" / "adapter"
    assert is_native(adapter)
    consolidate(adapter, folder / "base", tmp_path / "merged", progress=False)
    found, base = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", folder / "base"))
    for module, layer in read_adapter(adapter).layers.items():
        own, weight = layer.values, base.pop(f"{module}.weight").double()
        expected = weight + change(layer.shape, own["mora_M"].double(), KINDS[kind]["settings"]["type"])
        if "magnitude_offset" in own:
            magnitude = weight.norm(dim=1) + own["magnitude_offset"]
            expected = (magnitude / expected.norm(dim=1))[:, None] * expected
        assert toy.relative_error(found[f"{module}.weight"], expected) < 1e-6
        assert toy.relative_error(weight, expected) > 1e-3
    assert all(torch.equal(found[name], values) for name, values in base.items())
    logits = []
    for path in (tmp_path / "merged", folder / f"{kind}-2"):
        with torch.no_grad():
            logits.append(load_for_inference(str(path), "fp32")[0].cpu()(toy.tokens()).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4
