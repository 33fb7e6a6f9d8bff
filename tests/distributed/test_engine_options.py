"""Every engine option gives the numbers of the plain run: from start to end, resumed, from an adapter, evaluated."""

from pathlib import Path
from typing import Any

import pytest

from tests import toy
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks

EVERYTHING = 10**9
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hpz": {"hpz_partition_size": 2},
    "hpz, nothing persists": {"hpz_partition_size": 2, "param_persistence_threshold": 0},
    "offload_param": {"offload_param": "cpu"},
    "offload_optimizer": {"offload_optimizer": "cpu"},
    "nothing persists": {"param_persistence_threshold": 0},
    "all persists": {"param_persistence_threshold": EVERYTHING},
    "sequential": {"allgather_sequential": True},
    "small buckets, no reuse": {
        "prefetch_bucket_size": 500,
        "reduce_bucket_size": 500,
        "max_live_parameters": 1000,
        "max_reuse_distance": 0,
    },
    "fp32 communication": {"deepspeed": {"communication_data_type": "fp32"}},
    "sub-groups, no overlap": {
        "deepspeed": {
            "zero_optimization": {"sub_group_size": 100, "overlap_comm": False, "contiguous_gradients": False}
        }
    },
    "fetched by all-reduce": {"deepspeed": {"zero_optimization": {"stage3_use_all_reduce_for_fetch_params": True}}},
    "offload both, pinned": {
        "offload_param": "cpu",
        "offload_optimizer": "cpu",
        "deepspeed": {
            "zero_optimization": {"offload_param": {"pin_memory": True}, "offload_optimizer": {"pin_memory": True}}
        },
    },
    "layers as leaf modules": {
        "deepspeed": {
            "zero_optimization": {
                "leaf_module": {"classes": ["transformers.models.llama.modeling_llama.LlamaDecoderLayer"]}
            }
        }
    },
}
WITHIN = {"layers as leaf modules": 1e-6}  # gradients of a whole layer are reduced in another order: the last bit moves
NODES_OF_TWO = {"hpz_partition_size": 2, "param_persistence_threshold": 0}
DYNAMIC = {"dynamic_rank": True, "r": 4, "prune_start": 0.2, "prune_stop": 0.6, "prune_every": 2, "dem_weight": 0.1}
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.training_folder(tmp_path_factory.mktemp("engine"))


def three_runs(folder: Path, name: str, option: dict[str, Any]) -> list[dict[str, Any]]:
    """A run with dynamic rank, compaction and evaluation; one resumed within it; one from a trained adapter."""
    engine = {"param_persistence_threshold": 40, **option}
    training = {"max_steps": STEPS, "eval_every": 4, "micro_batch_size": 2, "activation_checkpointing": True}

    def described(kind: str, **changes: dict[str, Any]) -> dict[str, Any]:
        sections = {"engine": engine, "training": training, **changes}
        sections["checkpoint"] = {"keep_last": 9, **changes.get("checkpoint", {})}
        return config(folder / "base", folder / "data.json", folder / f"{name}-{kind}", **sections)

    whole = described("whole", adapter=DYNAMIC)
    resumed = described(
        "resumed", adapter=DYNAMIC, checkpoint={"resume": f"{whole['checkpoint']['run_dir']}/checkpoint-3"}
    )
    adapter = folder / "plain-static" / "checkpoint-3" / "adapter"
    static = described("static", training={**training, "max_steps": 3})
    started = described("started", adapter={"init_from": str(adapter)}, training={**training, "max_steps": 2})
    return [whole, resumed, *([static] if name == "plain" else []), started]


def all_options(folder: Path, options: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = {name: run(*three_runs(folder, name, option)) for name, option in options.items()}
    return {name: [runs[0], runs[1], runs[-1]] for name, runs in found.items()}


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return run_ranks(all_options, 2, folder, OPTIONS, timeout=600)[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_no_number(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    for kind, ours, plain in zip(("whole", "resumed", "started"), found[name], found["plain"], strict=True):
        for numbers in ("losses", "eval"):
            expected = plain[numbers]
            assert expected and ours[numbers] == (
                pytest.approx(expected, abs=WITHIN[name]) if name in WITHIN else expected
            ), kind


def test_a_second_shard_within_each_of_two_nodes_changes_no_number(
    folder: Path, found: dict[str, list[dict[str, Any]]]
) -> None:
    four = run_ranks(all_options, 4, folder, {"one of four": {}, "two of two": NODES_OF_TWO}, timeout=600)[0]
    assert four["two of two"] == four["one of four"]
    for ours, two in zip(four["one of four"], found["plain"], strict=True):
        assert ours["losses"] == pytest.approx(two["losses"], abs=1e-5)
