"""Importance from shards, pruning in every copy, and whole runs with dynamic rank, at worlds 1, 2 and 3."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_dist.checkpoint import run_folder
from tests import toy
from tests.distributed.test_training import fail_all
from tests.distributed.training_runs import config, metrics, run
from tests.ranks import run_ranks
from tests.toy import relative_error

SHAPES = [(11, 6), (6, 11), (1, 2), (3, 1), (64, 129)]  # cut rows, and ranks that hold nothing but padding
START_R, R = 5, 3
QUIET = {"max_grad_norm": 0.0}  # else gradients of closed gates, which are gone after compaction, move the clipping
KINDS = {"lora_B": 4e-3, "lora_gates": 2e-2, "magnitude_offset": 3e-3}
DYNAMIC = {"dynamic_rank": True, "r": 4, "prune_start": 0.2, "prune_stop": 0.6, "prune_every": 2, "dem_weight": 0.1}
PAPER = {"component_init": "paper", "component_scale": "paper"}


def score_and_prune(persistence: int) -> dict[str, Any]:
    """Train gated layers on this rank: importance beside the definition, and what 50 steps after the mask leave."""
    import deepspeed
    import torch.distributed as dist

    from dora_dist.adapters.components import Budget
    from dora_dist.adapters.inject import by_pattern, inject
    from dora_dist.adapters.methods import DynamicRank, WeightDecomposed
    from dora_dist.zero3.components import ShardedComponentPruner
    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.optimizer_state import inner_optimizer, read_state
    from dora_dist.zero3.partition import local_range, local_values
    from dora_dist.zero3.placement import ShardedPlacement
    from dora_dist.zero3.state_names import MASTER
    from tests.distributed.test_norms import Chain, engine_json, place_everything
    from tests.unit.test_components import brute_force, variance

    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = Chain()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject(model, by_pattern(WeightDecomposed(DynamicRank(START_R, 5.0)), [r"layers\.\d+"]))
    settings = engine_json(persistence, 1, dist.get_world_size())
    placement = ShardedPlacement(settings)
    place_everything(model, placement, weights)
    for parameter in model.parameters():  # padding is uninitialised memory in general: make it poison
        start, stop = local_range(parameter)
        parameter.ds_tensor[stop - start :] = float("nan")
    ShardedNormRefresher(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    pruner = ShardedComponentPruner(
        model, inner_optimizer(engine), Budget(R, START_R, 2, 6, 2), dem=0.1, clear_moments=True
    )
    errors, masks = [], []
    for _ in range(56):
        engine.backward(engine(torch.ones(4, 6)).square().sum())
        engine.step()
        if pruner.step < 6:
            for name, sums in pruner.layer_sums().items():
                layer = model.get_submodule(name)
                with deepspeed.zero.GatheredParameters([layer.lora_A, layer.lora_B, layer.lora_gates]):
                    errors.append(relative_error(sums.importance(), brute_force(layer)))
                    if layer.out_features > 1 and layer.in_features > 1:
                        errors.append(abs(sums.spread() / float(variance(layer)) - 1))
        pruner.settle()
        masks.append(torch.cat(list(pruner.pruned.values())).tolist())
    drift = 0.0
    for name, pruned in pruner.pruned.items():
        gates = model.get_submodule(name).lora_gates
        start, stop = local_range(gates)
        local = pruned[start:stop]
        drift += float(read_state(gates, MASTER)[local].abs().sum())
        drift += float(read_state(gates, "exp_avg")[local].abs().sum())
        drift += float(local_values(gates)[local].abs().sum())
        if gates.numel():
            drift += float(gates.detach()[pruned].abs().sum())
    scores = torch.cat(list(pruner.scores.values()))
    return {"errors": errors, "masks": masks, "drift": drift, "scores": scores}


@pytest.fixture(scope="module", params=[(1, 0), (2, 0), (3, 0), (3, 100)], ids=lambda p: f"world{p[0]}-persist{p[1]}")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    world_size, persistence = request.param
    return run_ranks(score_and_prune, world_size, persistence)


def test_importance_and_penalty_are_the_definitions(ranks: list[dict[str, Any]]) -> None:
    assert all(max(rank["errors"]) <= 1e-6 for rank in ranks)


def test_scores_and_masks_are_the_same_bits_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert torch.equal(rank["scores"], ranks[0]["scores"])
        assert rank["masks"] == ranks[0]["masks"]
        assert sum(rank["masks"][-1]) == len(SHAPES) * (START_R - R)


def test_what_is_pruned_stays_zero_in_every_copy(ranks: list[dict[str, Any]]) -> None:
    assert [rank["drift"] for rank in ranks] == [0.0] * len(ranks)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("dynamic")
    return toy.base_model(folder / "base"), toy.write_records(folder / "train.json", 40), folder


@pytest.fixture(scope="module")
def runs(files: tuple[Path, Path, Path]) -> dict[str, Path]:
    """The same dynamic-rank run at worlds 1, 2 and 3 (union), without magnitudes, and resumed in and after pruning.

    At every world size also one that starts as LoRA does, with rates for kinds of parameters.
    """
    base, data, folder = files

    def described(name: str, steps: int = 10, adapter: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        changes = {
            "adapter": {**DYNAMIC, **PAPER, **(adapter or {})},
            "training": {"max_steps": steps, **QUIET},
            **more,
        }
        changes["checkpoint"] = {"keep_last": 9, **changes.get("checkpoint", {})}
        return config(base, data, folder / name, **changes)

    def resumed(step: int) -> dict[str, Any]:
        return described(f"from{step}", checkpoint={"resume": str(folder / "world2" / f"checkpoint-{step}")})

    def as_lora(name: str, **more: Any) -> dict[str, Any]:
        start = {"component_init": "lora", "component_scale": "budget"}
        training = {"max_steps": 10, "learning_rates": KINDS, **QUIET}
        return described(name, adapter=start, training=training, **more)

    whole = described("whole", adapter={"compact": False})
    run_ranks(run, 1, described("world1"), whole, as_lora("lora1"))
    by_epochs = described("epochs", training={"epochs": 2.5, "max_steps": None})  # 35 samples in batches of 6
    plain = described("plain", adapter={"weight_decomposed": False})
    run_ranks(run, 2, described("world2"), plain, by_epochs, as_lora("lora2"))
    lora_from6 = as_lora("lora3from6", checkpoint={"resume": str(folder / "lora2" / "checkpoint-6")})
    run_ranks(run, 3, described("world3"), resumed(3), resumed(6), resumed(9), as_lora("lora3"), lora_from6)
    names = ["world1", "whole", "world2", "world3", "plain", "epochs", "from3", "from6", "from9"]
    names += ["lora1", "lora2", "lora3", "lora3from6"]
    return {name: folder / name for name in names}


def events(run_dir: Path) -> list[dict[str, Any]]:
    lines = run_folder.metrics(run_dir)
    return [
        {key: line[key] for key in line if key.startswith("component") or key == "step"}
        for line in lines
        if "components_kept" in line
    ]


def test_a_run_prunes_alike_at_every_world_size_and_after_a_resume(runs: dict[str, Path]) -> None:
    one = events(runs["world1"])
    assert [event["step"] for event in one] == [2, 4, 6]
    assert one[-1]["components_kept"] == one[-1]["components_budget"] == 8 * 4
    assert sum(one[-1]["components_by_layer"].values()) == 8 * 4
    assert events(runs["world2"]) == events(runs["world3"]) == one
    assert events(runs["from3"]) == one[1:]
    assert events(runs["from6"]) == events(runs["from9"]) == []
    assert events(runs["whole"]) == one


def test_components_that_start_as_lora_does_train_alike_at_every_world_size(runs: dict[str, Path]) -> None:
    one, paper = metrics(runs["lora1"])["losses"], metrics(runs["world1"])["losses"]
    assert one[1] == paper[1]  # both start at the base
    assert one[10] != paper[10]
    for name in ("lora2", "lora3", "lora3from6"):
        losses = metrics(runs[name])["losses"]
        assert losses == pytest.approx({step: one[step] for step in losses}, abs=1e-5)
        assert events(runs[name]) == (events(runs["lora1"]) if name != "lora3from6" else [])
    assert events(runs["lora1"])[-1]["components_kept"] == 8 * 4
    for step in (3, 9):  # before compaction and after it
        manifest = json.loads((runs["lora3"] / f"checkpoint-{step}" / "manifest.json").read_text())
        rates = sorted({round(rate / manifest["learning_rates"][0], 6) for rate in manifest["learning_rates"]})
        assert len(rates) == 1 + len(KINDS)


def test_the_budget_counts_steps_as_the_trainer_does(runs: dict[str, Path]) -> None:
    assert [event["step"] for event in events(runs["epochs"])] == [4, 6, 8, 9]  # 15 steps: window 3 to 9
    last = run_folder.newest_checkpoint(runs["epochs"])
    assert last is not None and last.name == "checkpoint-15"


def test_losses_do_not_depend_on_the_world_size_on_a_resume_or_on_compaction(runs: dict[str, Path]) -> None:
    whole = metrics(runs["world1"])["losses"]
    assert list(whole) == list(range(1, 11))
    for name in ("whole", "world2", "world3", "from3", "from6", "from9"):
        losses = metrics(runs[name])["losses"]
        assert losses == pytest.approx({step: whole[step] for step in losses}, abs=1e-5)


def test_compaction_leaves_what_survived_and_its_optimizer_state(runs: dict[str, Path]) -> None:
    from dora_dist.weights.safetensors_io import TensorFolder

    def numbers(run_dir: Path, step: int) -> int:
        entries = TensorFolder.open(run_dir / f"checkpoint-{step}" / "state.safetensors").entries
        return sum(entry.numel for name, entry in entries.items() if ".lora_gates." in name)

    assert numbers(runs["world1"], 3) == 3 * 8 * 6  # master and two moments of 8 layers' gates
    assert numbers(runs["world1"], 6) == numbers(runs["world1"], 10) == 3 * 8 * 4
    assert numbers(runs["whole"], 10) == 3 * 8 * 6
    manifest = json.loads((runs["world1"] / "checkpoint-10" / "manifest.json").read_text())
    assert manifest["adapter_ranks"] == events(runs["world1"])[-1]["components_by_layer"]


def sizes_around_compaction(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run trains and its optimizer holds on this rank, at the mask's step and at the end; and what is alive."""
    from dora_dist.adapters.layer import AdaptedLinear, adapted_layers
    from dora_dist.training.trainer import DoraTrainer
    from dora_dist.zero3.optimizer_state import inner_optimizer
    from dora_dist.zero3.partition import full_numel
    from dora_dist.zero3.state_names import MOMENTS

    found: list[dict[str, Any]] = []
    train = DoraTrainer.train

    def measured(trainer: Any, *args: Any, **options: Any) -> Any:
        alive = sum(isinstance(thing, AdaptedLinear) for thing in gc.get_objects())
        result = train(trainer, *args, **options)
        layers = adapted_layers(trainer.run.model)
        trained = [p for p in trainer.run.model.parameters() if p.requires_grad]
        state = inner_optimizer(trainer.model_wrapped).state
        found.append(
            {
                "alive": alive,
                "features": {name: (layer.in_features, layer.out_features) for name, layer in layers.items()},
                "trained": sum(full_numel(p) for p in trained),
                "masters": sum(master.numel() for master in state),
                "moments": sum(entry[key].numel() for entry in state.values() for key in MOMENTS),
                "kept": trainer.pruning.events[-1].by_layer if trainer.pruning.events else None,
            }
        )
        return result

    with patch.object(DoraTrainer, "train", measured):
        run(raw)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_and_optimizer_shrink_with_the_kept_components(
    world_size: int, files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, data, _ = files
    raw = config(base, data, tmp_path / "run", adapter=DYNAMIC, training={"max_steps": 7, **QUIET})
    ranks = run_ranks(sizes_around_compaction, world_size, raw)
    before, after = ranks[0]
    assert [[measured["alive"] for measured in rank] for rank in ranks] == [
        [8, 8]
    ] * world_size  # the old model is gone
    assert sum(before["kept"].values()) == 8 * 4
    assert len(set(before["kept"].values())) > 1
    for measured, kept in ((before, dict.fromkeys(before["kept"], 6)), (after, before["kept"])):
        sizes = [
            numel
            for name, (into, out) in measured["features"].items()
            for numel in (kept[name] * into, kept[name] * out, kept[name], out)
        ]
        assert measured["trained"] == sum(sizes)
        held = sum(-(-numel // world_size) for numel in sizes)  # by each rank, padding included
        stage = ranks[0].index(measured)
        assert [(rank[stage]["masters"], rank[stage]["moments"]) for rank in ranks] == [(held, 2 * held)] * world_size


@pytest.mark.parametrize("name", ["world2", "plain", "whole"])
def test_the_merged_model_and_peft_compute_the_trained_function(
    name: str, runs: dict[str, Path], files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dora_dist.checkpoint.consolidate import consolidate

    adapter = runs[name] / "checkpoint-10" / "adapter"
    consolidate(adapter, files[0], tmp_path / "merged", progress=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(files[0]).eval()
    before = base(toy.tokens()).logits.detach()
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        assert (merged(toy.tokens()).logits - theirs(toy.tokens()).logits).abs().max() <= 1e-4
        assert (merged(toy.tokens()).logits - before).abs().max() > 1e-2
    ranks = json.loads((adapter / "adapter_config.json").read_text())["rank_pattern"]
    assert len(set(ranks.values())) > 1


def test_a_schedule_that_does_not_fit_and_another_budget_are_refused_before_the_base_is_read(
    runs: dict[str, Path], files: tuple[Path, Path, Path]
) -> None:
    base, data, folder = files
    hollow = shutil.copytree(base, folder / "hollow")
    weights = load_file(hollow / "model.safetensors")
    damaged = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    save_file(damaged, hollow / "model.safetensors", metadata={"format": "pt"})  # which to load would be an error
    nonsense = folder / "nonsense.json"
    nonsense.write_text("[")
    resume = {"resume": str(folder / "world2" / "checkpoint-3")}

    def described(training: dict[str, Any], checkpoint: dict[str, Any], data: Path = data, **adapter: Any) -> Any:
        changes = {"adapter": {**DYNAMIC, **adapter}, "training": training, "checkpoint": checkpoint}
        return config(hollow, data, folder / "refused", **changes)

    refused = [
        described({"max_steps": 10}, {}, data=nonsense, prune_every=5),  # not even the data is read
        described({"max_steps": None, "epochs": 0.3}, {}),
        described({"max_steps": 10}, resume, r=3, start_rank_factor=2.0),
        described({"max_steps": 20}, resume),
    ]
    for long, short, target, stretched in run_ranks(fail_all, 2, refused):
        assert "adapter.prune_every = 5: the pruning window, steps 2 to 6 of 10, is shorter than 5 steps" in long
        assert "steps 0 to 1 of 2, is shorter than 2 steps; lower it, widen adapter.prune_start" in short
        assert "was written with adapter.r = 4, this run has 3" in target
        assert "adapter.prune_start (or the number of steps) gives first = 2 there and 4 here" in stretched


def test_the_rank_map_is_drawn(runs: dict[str, Path]) -> None:
    assert (runs["world2"] / "rank_map.png").read_bytes().startswith(b"\x89PNG")
