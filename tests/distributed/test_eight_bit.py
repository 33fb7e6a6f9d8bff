"""AdamW with moments in 8 bits on real ranks: beside torch's, saved, resumed at other world sizes, pruned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import toy
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks

STEPS = 6
DYNAMIC = {"dynamic_rank": True, "r": 4, "prune_start": 0.2, "prune_stop": 0.6, "prune_every": 1, "dem_weight": 0.1}


def described(
    folder: Path, name: str, *, resume: str | None = None, optimizer: str = "adamw_8bit", **changes: Any
) -> Any:
    return config(
        folder / "base",
        folder / "data.json",
        folder / name,
        adapter={"r": 16, **changes.get("adapter", {})},
        training={"optimizer": optimizer, "max_steps": STEPS, "activation_checkpointing": False},
        checkpoint={"resume": resume and str(folder / resume), "keep_last": 9},
    )


Results = tuple[Path, dict[str, dict[int, float]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = toy.training_folder(tmp_path_factory.mktemp("eight"))
    third = "eight/checkpoint-3"
    on_two = {
        "torch": described(folder, "torch", optimizer="adamw"),
        "eight": described(folder, "eight"),
        "resumed": described(folder, "resumed", resume=third),
        "pruned": described(folder, "pruned", adapter={**DYNAMIC, "r": 12}),
    }
    on_three = {
        "of three": described(folder, "of three", resume=third),
        "with torch": described(folder, "with torch", resume=third, optimizer="adamw"),
    }
    found = dict(zip(on_two, run_ranks(run, 2, *on_two.values(), timeout=300)[0], strict=True))
    found |= dict(zip(on_three, run_ranks(run, 3, *on_three.values(), timeout=300)[0], strict=True))
    return folder, {name: each["losses"] for name, each in found.items()}


def test_losses_are_near_those_of_32_bits(results: Results) -> None:
    _, losses = results
    whole, eight = losses["torch"], losses["eight"]
    assert eight[1] == whole[1]
    assert list(eight.values()) == pytest.approx(list(whole.values()), rel=5e-3)
    assert list(eight.values())[2:] != list(whole.values())[2:]
    assert eight[STEPS] < eight[1] - 0.15


def test_a_checkpoint_has_the_moments_in_fp32(results: Results) -> None:
    folder, _ = results
    eight, whole = (load_file(folder / name / "checkpoint-3" / "state.safetensors") for name in ("eight", "torch"))
    assert eight.keys() == whole.keys()
    for kind, within in (("exp_avg", 0.1), ("exp_avg_sq", 0.1)):
        ours, theirs = (
            torch.cat([values.flatten() for name, values in sorted(of.items()) if name.endswith(f".{kind}")])
            for of in (eight, whole)
        )
        assert ours.dtype is torch.float32
        assert 0 < toy.relative_error(ours, theirs) < within


@pytest.mark.parametrize("name", ["resumed", "of three", "with torch"])
def test_a_run_goes_on_at_any_world_size_and_with_the_other(results: Results, name: str) -> None:
    _, losses = results
    expected = [losses["eight"][step] for step in range(4, STEPS + 1)]
    assert [losses[name][step] for step in range(4, STEPS + 1)] == pytest.approx(expected, rel=5e-3)


def test_components_are_pruned_and_a_run_compacted(results: Results) -> None:
    folder, losses = results
    assert losses["pruned"][STEPS] < losses["pruned"][1] - 0.1
    state = load_file(folder / "pruned" / f"checkpoint-{STEPS}" / "state.safetensors")
    gates = {name: values for name, values in state.items() if "lora_gates" in name}
    assert sum(values.numel() for name, values in gates.items() if name.endswith("master")) < 18 * 8
    assert any(values.any() for name, values in gates.items() if name.endswith("exp_avg"))
