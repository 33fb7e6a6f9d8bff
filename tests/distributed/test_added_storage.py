"""Packed storages, from outside of the package and its own, trained, resumed and merged on shards."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_dist.runtime import plugins
from tests import toy
from tests.conftest import ROOT
from tests.distributed import training_runs
from tests.distributed.training_runs import config
from tests.ranks import run_ranks

EXAMPLES = ROOT / "examples"
PLUGINS = ["add_a_storage", "tests.storages"]
RECORDS = {
    "eight_bits": (64, 66),
    "two_tensors": (10, 9),
    "int8": (64, 66),
    "nf4": (64, 34),
    'nf4 {"block_size": 128, "double_quant": true}': (2048, 1042),
}
"""Numbers of a weight in a record, and bytes of a record in all of the storage's tensors."""
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
"""The other projections have no adapter, and are packed all the same."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    plugins.load(PLUGINS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.training_folder(tmp_path_factory.mktemp("added_storage"))


def decoded_base(folder: Path, storage: str) -> Path:
    """The base with the weights that `storage` makes of those of the layers, adapted or not."""
    from dora_dist.adapters.storage import labelled

    target = folder / f"base-{list(RECORDS).index(storage)}"
    if not target.exists():
        toy.base_model(target)
        tensors = load_file(folder / "base" / "model.safetensors")
        for name, values in tensors.items():
            if name.endswith("_proj.weight"):
                tensors[name] = labelled(storage, "").round_trip(values.flatten()).view(values.shape)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def run(*configurations: dict[str, Any]) -> list[dict[str, Any]]:
    sys.path.insert(0, str(EXAMPLES))
    return training_runs.run(*configurations)


def section(storage: str) -> dict[str, Any]:
    """What the model section of a configuration says of a storage, by its label."""
    name, _, settings = storage.partition(" ")
    return {"storage": name, "storage_settings": json.loads(settings or "{}")}


def packed(folder: Path, storage: str, run_dir: Path, **changes: Any) -> dict[str, Any]:
    model = {"path": str(folder / "base"), **section(storage)}
    return config(folder / "base", folder / "data.json", run_dir, model=model, **changes) | {"plugins": PLUGINS}


@pytest.mark.parametrize(("storage", "world_size"), [("eight_bits", 1), ("int8", 2), ("nf4", 3), ("two_tensors", 3)])
def test_training_is_that_of_the_decoded_base(storage: str, world_size: int, folder: Path, tmp_path: Path) -> None:
    plain = config(decoded_base(folder, storage), folder / "data.json", tmp_path / "plain")
    for ours, theirs in run_ranks(run, world_size, packed(folder, storage, tmp_path / "packed"), plain):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-6)
        assert ours["eval"] == pytest.approx(theirs["eval"], abs=2e-6)
        assert len(ours["losses"]) == 6
        assert abs(ours["losses"][6] - ours["losses"][1]) > 1e-3
    state = load_file(tmp_path / "packed/checkpoint-6/state.safetensors")
    expected = load_file(tmp_path / "plain/checkpoint-6/state.safetensors")
    assert state.keys() == expected.keys()  # what trains, and nothing of the base
    for name, values in expected.items():
        torch.testing.assert_close(state[name], values, rtol=1e-3, atol=1e-5)


def build(base: str, storage: str) -> dict[str, Any]:
    """Build on shards: bytes read and held of each adapted weight, and row norms."""
    import torch.distributed as dist

    from dora_dist.adapters.held import held_layers
    from dora_dist.adapters.layer import adapted_layers
    from dora_dist.config import AdapterConfig, ModelConfig
    from dora_dist.training.model import build_model
    from tests.distributed.test_loading import engine_json

    sys.path.insert(0, str(EXAMPLES))
    plugins.load(PLUGINS)
    run = build_model(
        ModelConfig(path=base, dtype="fp32", **section(storage)),
        AdapterConfig(r=4, target_modules=list(TARGETS)),
        deepspeed=engine_json(dist.get_world_size()),
    )
    layers = held_layers(run.model)
    return {
        "read": run.base_bytes_read,
        "held": {n: sum(p.ds_tensor.nbytes for p in layer.held()) for n, layer in layers.items()},
        "cuts": {
            (len(p.ds_tensor), -(-p.ds_numel // dist.get_world_size()))
            for layer in layers.values()
            for p in layer.held()
        },
        "dtypes": {p.ds_tensor.dtype for layer in layers.values() for p in layer.held()},
        "norms": {name: layer.base_norm for name, layer in adapted_layers(run.model).items()},
        "weights": run.weights,
    }


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("storage", RECORDS)
def test_a_rank_reads_and_holds_its_records_alone(storage: str, world_size: int, folder: Path) -> None:
    tensors = load_file(decoded_base(folder, storage) / "model.safetensors")
    numbers, size = RECORDS[storage]
    found = run_ranks(build, world_size, str(folder / "base"), storage)
    total = sum(values.nbytes for values in tensors.values())
    assert sum(rank["read"] for rank in found) == total
    for rank in found:
        assert rank["read"] <= total / world_size + 4 * numbers * len(rank["held"]) + 4 * len(tensors)
        for name, held in rank["held"].items():
            records = -(-tensors[f"{name}.weight"].numel() // numbers)
            assert held == -(-records // world_size) * size
        for name, found_norms in rank["norms"].items():
            norms = tensors[f"{name}.weight"].double().norm(dim=1).float()
            torch.testing.assert_close(found_norms, norms, rtol=1e-6, atol=0)
        assert len(rank["held"]) == sum(name.endswith("_proj.weight") for name in tensors) > len(rank["norms"])
        assert {torch.uint8, torch.int8} & rank["dtypes"]
        # The engine's gathers allocate ceil(numel / world size) elements a rank: shards must be that long.
        assert all(ours == theirs for ours, theirs in rank["cuts"])
        assert rank["weights"] > total // 4  # as many as the model has, whatever their bytes


def test_a_run_goes_on_at_another_world_size_and_merges_into_the_decoded_base(folder: Path, tmp_path: Path) -> None:
    from dora_dist.checkpoint.consolidate import consolidate
    from dora_dist.evaluation.inference import load_for_inference

    decoded = decoded_base(folder, "eight_bits")
    run_dir = tmp_path / "packed"
    whole = config(decoded, folder / "data.json", tmp_path / "plain")
    short = packed(folder, "eight_bits", run_dir, training={"max_steps": 3, "schedule": "constant"})
    whole["training"]["schedule"] = "constant"
    [[_, expected]] = run_ranks(run, 1, short, whole)
    longer = packed(folder, "eight_bits", run_dir, training={"schedule": "constant"}, checkpoint={"resume": "auto"})
    for [ours] in run_ranks(run, 2, longer):
        assert ours["losses"] == pytest.approx(expected["losses"], abs=1e-5)

    for adapter, base, merged in ((run_dir, folder / "base", "ours"), (tmp_path / "plain", decoded, "theirs")):
        consolidate(adapter / "checkpoint-6/adapter", base, tmp_path / merged, progress=False)
    ours, theirs = (load_file(tmp_path / merged / "model.safetensors") for merged in ("ours", "theirs"))
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-4, atol=1e-5)
    logits = []
    for path in (run_dir / "checkpoint-6", tmp_path / "ours"):
        model, _ = load_for_inference(str(path), "fp32")
        with torch.no_grad():
            logits.append(model(input_ids=toy.tokens()).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_a_storage_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    from dora_dist.adapters import storage
    from dora_dist.checkpoint.consolidate import consolidate
    from dora_dist.runtime.errors import UserError

    run_ranks(run, 1, packed(folder, "eight_bits", tmp_path / "run", training={"max_steps": 1}))
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(storage._STORAGES, "eight_bits")
        with pytest.raises(UserError, match='storage = "eight_bits": no such storage .*plugins'):
            consolidate(tmp_path / "run/checkpoint-1/adapter", folder / "base", tmp_path / "merged", progress=False)
