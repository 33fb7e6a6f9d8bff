"""Sharded loading: every rank reads its own bytes, holds its own share, and all ranks refuse a broken base alike."""

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.ranks import run_ranks

MIB = 2**20


def engine_json(world_size: int, dtype: str = "fp32") -> dict[str, Any]:
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 30},
        "zero_allow_untested_optimizer": True,
    }


def build(base: str, dtype: str = "fp32") -> Any:
    import deepspeed
    import torch.distributed as dist

    from dora_dist.adapters.methods import LowRank, WeightDecomposed
    from dora_dist.models.build import build_model
    from dora_dist.models.families import adapter_plan
    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.placement import ShardedPlacement

    deepspeed.init_distributed("gloo", verbose=False)
    placement = ShardedPlacement(engine_json(dist.get_world_size(), dtype))
    plan = adapter_plan(WeightDecomposed(LowRank(4, 8.0)))
    return build_model(Path(base), plan, placement, refresher=ShardedNormRefresher, dtype=dtype)


def logits(bases: list[tuple[str, str]]) -> list[torch.Tensor]:
    """Step-0 logits on the engine, for (folder, dtype)."""
    import deepspeed
    import torch.distributed as dist

    found = []
    for base, dtype in bases:
        run = build(base, dtype)
        trainable = [p for p in run.model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=run.model,
            optimizer=torch.optim.AdamW(trainable),
            config=engine_json(dist.get_world_size(), dtype),
        )
        with torch.no_grad():
            found.append(engine(input_ids=toy.tokens()).logits)
    return found


@pytest.fixture
def threads_of_a_rank(world_size: int) -> Iterator[None]:
    """As many threads here as a rank has: the bits of an fp32 product depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.usefixtures("threads_of_a_rank")
def test_step_0_logits_are_the_base_models_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    float16 = toy.base_model(tmp_path / "fp16", torch.float16)
    cases = [
        (toy.base_model(tmp_path / "fp32"), "fp32"),
        (toy.base_model(tmp_path / "bf16", torch.bfloat16), "bf16"),
        (toy.base_model(tmp_path / "tied", tie_word_embeddings=True), "fp32"),
        (toy.base_model(tmp_path / "bias", torch.bfloat16, attention_bias=True, mlp_bias=True), "bf16"),
        (float16, "fp32"),  # another dtype on disk than in the run
    ]
    indexed = tmp_path / "indexed"
    AutoModelForCausalLM.from_pretrained(cases[0][0]).save_pretrained(indexed, max_shard_size="30KB")
    assert (indexed / "model.safetensors.index.json").exists()
    cases.append((indexed, "fp32"))
    ranks = run_ranks(logits, world_size, [(str(base), dtype) for base, dtype in cases])
    for number, (base, dtype) in enumerate(cases):
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        expected = AutoModelForCausalLM.from_pretrained(base, dtype=kind)(toy.tokens()).logits
        for rank in ranks:
            assert torch.equal(rank[number], expected), (base.name, dtype)


def load_and_measure(base: str) -> dict[str, float]:
    """Bytes read, and the growth of this process's resident peak while loading, beyond imports and the engine."""

    small = str(Path(base).parent / "small")
    build(small)  # whatever the libraries allocate once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run = build(base)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"read": run.base_bytes_read, "grown": after - before}


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_reads_and_holds_its_share(world_size: int, tmp_path: Path) -> None:
    toy.base_model(tmp_path / "small")
    sizes = {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    base = toy.base_model(tmp_path / "big", torch.float32, vocab_size=32000, **sizes)
    size = (base / "model.safetensors").stat().st_size
    assert size > 450e6  # large beside what is allowed on top of a share
    for rank in run_ranks(load_and_measure, world_size, str(base)):
        assert rank["read"] <= size / world_size + MIB
        assert rank["grown"] <= size / world_size + 300e6


def refusals(bases: list[str]) -> list[str]:
    from dora_dist.runtime.errors import UserError

    messages = []
    for base in bases:
        try:
            build(base)
        except UserError as error:
            messages.append(str(error))
        else:
            messages.append("accepted")
    return messages


def test_a_broken_base_is_refused_on_every_rank(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    truncated = toy.base_model(tmp_path / "truncated")
    with (truncated / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    missing = toy.base_model(tmp_path / "missing")
    tensors = load_file(missing / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, missing / "model.safetensors")
    misshapen = toy.base_model(tmp_path / "misshapen")
    tensors = load_file(misshapen / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(35)
    save_file(tensors, misshapen / "model.safetensors")
    nowhere = toy.base_model(tmp_path / "nowhere")
    (nowhere / "model.safetensors").rename(nowhere / "other.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (nowhere / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    ranks = run_ranks(refusals, 2, [str(b) for b in (truncated, missing, misshapen, nowhere)])
    for cut, absent, shape, index in ranks:
        assert "model.safetensors" in cut and "accepted" not in cut
        assert "model.layers.1.mlp.up_proj.weight" in absent
        assert "model.norm.weight" in shape and "[35]" in shape and "[36]" in shape
        assert "model-00001-of-00001.safetensors" in index
