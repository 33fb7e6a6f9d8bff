"""Packed bases with what else a run may have: numbers are those of a plain run over the decoded base."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_dist.adapters.folders import open_adapter
from dora_dist.adapters.storage import labelled
from dora_dist.checkpoint.consolidate import consolidate
from tests import llava, subtasks, summaries, toy
from tests.distributed import training_runs
from tests.distributed.training_runs import config, metrics
from tests.mora_by_formula import change
from tests.ranks import run_ranks

PACKED = re.compile(r".*\.layers\.\d+\..*(_proj|fc\d)\.weight")
"""What a storage holds, by its name in the base; but for what is in a vision tower."""
STEPS = 6
HPZ = {"hpz_partition_size": 2, "param_persistence_threshold": 0}
OFFLOAD = {"offload_param": "cpu", "offload_optimizer": "cpu"}
ALL_REDUCE = {"deepspeed": {"zero_optimization": {"stage3_use_all_reduce_for_fetch_params": True}}}
CHECKPOINTING = {"activation_checkpointing": True}
SELECTIVE = {"activation_checkpointing": "selective"}
TOWER_TOO = [r".*(vision_tower|language_model)\..*\.(q|v)_proj"]


@dataclass(frozen=True)
class Kind:
    """A run of `model` (texts, pictures or tasks) over a base in `storage`, with these sections.

    `engine` is the engine's section on two ranks.
    """

    storage: str
    model: str = "texts"
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "dynamic rank, hpZ": Kind(
        "int8",
        adapter={
            "dynamic_rank": True,
            "prune_start": 0.2,
            "prune_stop": 0.6,
            "prune_every": 1,
            "dem_weight": 0.1,
            "norm_gradient": "full",
        },
        training=SELECTIVE,
        engine=HPZ,
    ),
    "selective, offload": Kind(
        'nf4 {"block_size": 128, "double_quant": true}',
        adapter={"dropout": 0.1},  # "exact": two products are kept
        training=SELECTIVE,
        engine=OFFLOAD,
    ),
    "mora": Kind(
        "nf4",
        adapter={"method": "mora", "r": 3, "settings": {"type": 6}, "norm_gradient": "full"},
        engine=ALL_REDUCE,
    ),
    "llava": Kind(
        "nf4",
        model="pictures",
        adapter={"target_modules": TOWER_TOO, "dropout": 0.1},
        training=CHECKPOINTING,
    ),
    "vl-bart": Kind(
        "int8",
        model="tasks",
        # Not k_proj's bias, which changes no output: Adam would make steps out of its gradient's rounding.
        adapter={"target_modules": None, "norm_gradient": "full", "trained_parameters": ["fc1.bias", "q_proj.bias"]},
    ),
}
ANY_WORLD = ("dynamic rank, hpZ", "mora")
"""Those whose losses do not know the ranks: without dropout."""


def make_bases(folder: Path) -> None:
    """For each of texts, pictures and tasks, `base` and data."""
    for kind in ("texts", "pictures", "tasks"):
        (folder / kind).mkdir()
    toy.training_folder(folder / "texts")
    llava.model(folder / "pictures" / "base")
    llava.write(folder / "pictures", 6, 3)
    sizes = {"encoder_layers": 1, "decoder_layers": 1}
    summaries.base_model(folder / "tasks" / "base", subtasks.texts(), init_std=0.1, **sizes)
    subtasks.features(folder / "tasks", 7)


def data_of(folder: Path, model: str) -> dict[str, dict[str, Any]]:
    """The sections that a model and its data need."""
    place = folder / model
    if model == "pictures":
        pictures = {"format": "llava", "image_folder": str(place / "pictures"), "loss_on": "answer"}
        return {
            "model": {"task": "image_text_to_text"},
            "data": {**pictures, "validation_samples": 0, "cutoff_len": 256, "cache": None},
        }
    if model == "tasks":
        data = subtasks.section(place, subtasks.write(place, 6, ("nlvr2", "tvc")))
        return {
            "model": {"task": "vision_seq2seq_lm", "feature_dim": subtasks.WIDTH},
            "data": {**data, "validation_samples": 0},
        }
    return {"model": {}, "data": {}}


def decoded(folder: Path, name: str) -> Path:
    """The base of a kind of run, with the weights that its storage makes of those that it holds."""
    kind = KINDS[name]
    target = folder / f"decoded-{list(KINDS).index(name)}"
    if not target.exists():
        shutil.copytree(folder / kind.model / "base", target)
        for file in target.glob("*.safetensors"):
            tensors = load_file(file)
            for tensor, values in tensors.items():
                if is_packed(tensor):
                    tensors[tensor] = labelled(kind.storage, "").round_trip(values.flatten()).view(values.shape)
            save_file(tensors, file, {"format": "pt"})
    return target


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


def is_packed(tensor: str) -> bool:
    return PACKED.fullmatch(tensor) is not None and "vision_tower" not in tensor


def described(folder: Path, name: str, run: str, *, plain: bool = False, world: int = 2, **checkpoint: Any) -> Any:
    kind = KINDS[name]
    sections = data_of(folder, kind.model)
    storage, _, settings = kind.storage.partition(" ")
    if not plain:
        sections["model"] |= {"storage": storage, "storage_settings": json.loads(settings or "{}")}
    return config(
        decoded(folder, name) if plain else folder / kind.model / "base",
        folder / kind.model / "data.json",
        folder / run,
        adapter=kind.adapter,
        training={"max_steps": STEPS, "micro_batch_size": 2, **kind.training},
        engine=kind.engine if world == 2 else {},
        checkpoint={"save_every": 2, "keep_last": 9, **checkpoint},
        **sections,
    )


def run(*runs: tuple[dict[str, Any], str | None]) -> list[list[float]]:
    """Train each on this rank; the largest relative errors of row norms against a decoded base, at each phase's end."""
    from dora_dist.training.trainer import DoraTrainer

    errors: list[list[float]] = []
    train = DoraTrainer.train

    def measured(trainer: Any, *args: Any, **options: Any) -> Any:
        result = train(trainer, *args, **options)
        if base := runs[len(errors) - 1][1]:
            errors[-1].append(norm_error(trainer.run.norms, all_tensors(Path(base))))
        return result

    with patch.object(DoraTrainer, "train", measured):
        for raw, _ in runs:
            errors.append([])
            training_runs.run(raw)
    return errors


def norm_error(norms: Any, base: dict[str, Tensor]) -> float:
    """Of ‖W0‖ and of ‖W0 + ΔW‖ by the formula, in fp64."""
    import deepspeed

    norms.refresh()
    found = []
    for name, layer in norms.layers.items():
        weight = base[f"{name}.weight"].double()
        with deepspeed.zero.GatheredParameters(list(layer.adapter_parameters().values())):
            own = {kind: p.detach().double() for kind, p in layer.adapter_parameters().items()}
        update = torch.zeros_like(weight)
        if "mora_M" in own:
            update = change(layer.shape, own["mora_M"], 6)
        elif "lora_B" in own:  # else dynamic rank has left none of the layer's components
            update = layer.method.scaling * (own["lora_B"] * own.get("lora_gates", 1.0)) @ own["lora_A"].t()
        for ours, exact in ((layer.base_norm, weight.norm(dim=1)), (layer.norm, (weight + update).norm(dim=1))):
            found.append(float(((ours.double() - exact) / exact).abs().max()))
    return max(found)


@dataclass
class Found:
    folder: Path
    norms: dict[str, list[float]]  # of each run that was measured, at each phase's end

    def losses(self, name: str) -> dict[int, float]:
        losses: dict[int, float] = metrics(self.folder / name)["losses"]
        return losses


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Every kind on two ranks, packed and plain; two also on other ranks. One is resumed, from before its compaction,
    on two and on three.
    """
    folder = tmp_path_factory.mktemp("quantised")
    make_bases(folder)
    dynamic, mora = ANY_WORLD
    resume = str(folder / f"{dynamic}-2" / "checkpoint-2")
    on: dict[int, dict[str, Any]] = {
        1: {f"{name}-1": described(folder, name, f"{name}-1", world=1) for name in ANY_WORLD},
        2: {
            **{f"{name}-2": described(folder, name, f"{name}-2") for name in KINDS},
            **{f"{name}-plain": described(folder, name, f"{name}-plain", plain=True) for name in KINDS},
            "resumed-2": described(folder, dynamic, "resumed-2", resume=resume),
        },
        3: {
            f"{mora}-3": described(folder, mora, f"{mora}-3", world=3),
            "resumed-3": described(folder, dynamic, "resumed-3", world=3, resume=resume),
        },
    }
    norms: dict[str, list[float]] = {}
    for world, runs in sorted(on.items(), key=lambda pair: pair[0] != 2):  # the others resume what two ranks wrote
        names = {run: next((n for n in KINDS if run.startswith(n)), dynamic) for run in runs}
        of_texts = {run: name for run, name in names.items() if KINDS[name].model == "texts"}
        pairs = [(raw, str(decoded(folder, names[run])) if run in of_texts else None) for run, raw in runs.items()]
        norms |= dict(zip(runs, run_ranks(globals()["run"], world, *pairs)[0], strict=True))
    return Found(folder, norms)


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_those_of_the_decoded_base(found: Found, name: str) -> None:
    ours, theirs = (found.losses(f"{name}-{which}") for which in ("2", "plain"))
    assert list(ours) == list(range(1, STEPS + 1))
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert abs(ours[STEPS] - ours[1]) > 1e-3  # it trains


@pytest.mark.parametrize("name", ANY_WORLD)
def test_losses_do_not_know_the_ranks(found: Found, name: str) -> None:
    two = found.losses(f"{name}-2")
    others = [f"{name}-1", f"{name}-3" if name == "mora" else "resumed-3"]
    for losses in map(found.losses, others):
        assert len(losses) >= STEPS - 2
        assert losses == pytest.approx({step: two[step] for step in losses}, abs=1e-5)


def test_row_norms_from_packed_shards_are_those_of_the_decoded_weight(found: Found) -> None:
    measured = {name: errors for name, errors in found.norms.items() if errors}
    assert {name.rpartition("-")[2] for name in measured} == {"1", "2", "3", "plain"}
    assert len(measured[f"{ANY_WORLD[0]}-2"]) == 2  # before compaction and after it
    assert max(max(errors) for errors in measured.values()) <= 1e-6


def test_a_resumed_run_goes_on_bit_for_bit_through_its_compaction(found: Found) -> None:
    whole, resumed = (found.folder / name for name in (f"{ANY_WORLD[0]}-2", "resumed-2"))
    losses = found.losses(whole.name)
    assert found.losses("resumed-2") == {step: losses[step] for step in range(3, STEPS + 1)}
    states = [load_file(path / f"checkpoint-{STEPS}" / "state.safetensors") for path in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())
    plain = found.folder / f"{ANY_WORLD[0]}-plain"
    ranks = [json.loads((path / f"checkpoint-{STEPS}/manifest.json").read_text()) for path in (whole, plain)]
    assert ranks[0]["compacted"] and ranks[0]["adapter_ranks"] == ranks[1]["adapter_ranks"]


@pytest.mark.parametrize("name", KINDS)
def test_merged_it_is_the_merged_decoded_base(found: Found, name: str, tmp_path: Path) -> None:
    """And the folder says what was packed: of LLaVA the language model's layers alone, though the tower is adapted."""
    bases = {"2": found.folder / KINDS[name].model / "base", "plain": decoded(found.folder, name)}
    for which, base in bases.items():
        adapter = found.folder / f"{name}-{which}" / f"checkpoint-{STEPS}" / "adapter"
        consolidate(adapter, base, tmp_path / which, progress=False)
    ours, theirs, known = map(all_tensors, (tmp_path / "2", tmp_path / "plain", bases["2"]))
    assert ours.keys() == theirs.keys()
    for tensor, values in theirs.items():
        torch.testing.assert_close(ours[tensor], values, rtol=1e-3, atol=5e-5)
    written = open_adapter(found.folder / f"{name}-2" / f"checkpoint-{STEPS}" / "adapter")
    assert written.base_storage() == KINDS[name].storage
    packed = written.base_packed()
    assert packed is not None and len(packed) == sum(map(is_packed, known))
    assert not any("vision_tower" in module for module in packed)
    card = (written.path / "README.md").read_text()
    assert f"held as {KINDS[name].storage.partition(' ')[0]} in training" in card
