"""A method from outside of the package, trained, resumed and merged on shards, against its formula."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.runtime import plugins
from tests import toy
from tests.conftest import ROOT
from tests.distributed import training_runs
from tests.distributed.training_runs import config, metrics
from tests.ranks import run_ranks

EXAMPLES = str(ROOT / "examples")
SETTINGS = {"spread": 0.5}
ALPHA = 6.0
NAMES = ("loha", "dloha")


def run(*configurations: dict[str, Any]) -> list[dict[str, Any]]:
    sys.path.insert(0, EXAMPLES)
    plugins.load(configurations[0]["plugins"])
    return training_runs.run(*configurations)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two ranks, plain and with a magnitude; resumed on three; and on one rank, by the formula."""
    folder = toy.training_folder(tmp_path_factory.mktemp("added_method"))

    def described(name: str, decomposed: bool, **checkpoint: Any) -> dict[str, Any]:
        adapter = {
            "method": "loha",
            "settings": SETTINGS,
            "r": 3,
            "lora_alpha": ALPHA,
            "weight_decomposed": decomposed,
        }
        sections = config(folder / "base", folder / "data.json", folder / name, adapter=adapter, checkpoint=checkpoint)
        return sections | {"plugins": ["add_a_method"]}

    def by_formula(name: str, decomposed: bool) -> dict[str, Any]:
        sections = described(name, False) | {"plugins": ["add_a_method", "tests.loha_by_formula"]}
        changed = {"method": "loha_by_formula", "settings": SETTINGS | {"decomposed": decomposed}}
        return sections | {"adapter": sections["adapter"] | changed}

    run_ranks(run, 2, described("loha", False), described("dloha", True))
    resumed = [described(f"{name}-on", name == "dloha", resume=str(folder / name / "checkpoint-3")) for name in NAMES]
    run_ranks(run, 3, *resumed)
    run_ranks(run, 1, by_formula("loha-formula", False), by_formula("dloha-formula", True))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_losses_on_two_ranks_are_the_formulas(folder: Path, name: str) -> None:
    losses, expected = metrics(folder / name)["losses"], metrics(folder / f"{name}-formula")["losses"]
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert abs(losses[6] - losses[1]) > 1e-3  # it trains


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(folder: Path, name: str) -> None:
    whole, resumed = metrics(folder / name)["losses"], metrics(folder / f"{name}-on")["losses"]
    assert list(resumed) == [4, 5, 6]
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_are_the_formulas(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    plugins.load(["add_a_method"])
    from add_a_method import LoHa

    from tests.loha_by_formula import adapted

    checkpoint = folder / name / "checkpoint-6"
    consolidate(checkpoint / "adapter", folder / "base", tmp_path / "merged", progress=False)
    merged, base = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", folder / "base"))
    state = load_file(checkpoint / "state.safetensors")
    changed = 0
    for tensor, values in base.items():
        module = tensor.removesuffix(".weight")
        own = {
            key.removesuffix(".master").rpartition(".")[2]: value
            for key, value in state.items()
            if key.startswith(f"{module}.") and key.endswith(".master")
        }
        expected = adapted(values, LoHa(r=3, lora_alpha=ALPHA, **SETTINGS), own) if own else values
        torch.testing.assert_close(merged[tensor], expected, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(merged[tensor], values)
    assert changed == 8  # four modules of two layers
