"""Bases that are not what they seem: the remedies that are named work, and numbers are those of transformers."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dora_dist.adapters.methods import LowRank, WeightDecomposed
from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.config import AdapterConfig, ModelConfig
from dora_dist.evaluation.inference import load_for_inference
from dora_dist.models.build import AdaptedModel, build_model
from dora_dist.models.families import adapter_plan
from dora_dist.models.folder import ModelFolder
from dora_dist.runtime.errors import UserError
from dora_dist.training.checks import check_own_code
from dora_dist.weights.placement import WholePlacement
from tests import toy

BLOCK = 128


def build(base: Path, **options: Any) -> AdaptedModel:
    return build_model(base, adapter_plan(WeightDecomposed(LowRank(4, 8.0))), WholePlacement(), dtype="fp32", **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=toy.tokens()).logits
    return found


def as_fp8(base: Path) -> dict[str, Tensor]:
    """Store a folder's projections as the hub's FP8 folders do. Returns the weights that they stand for, fp32."""
    stored, meant = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            stored[name] = weight
            continue
        rows, columns = weight.shape
        blocks = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
        blocks[:rows, :columns] = weight.float()
        blocks = blocks.view(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK)
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        codes = (blocks / scales).to(torch.float8_e4m3fn)
        meant[name] = (codes.float() * scales).flatten(2).flatten(0, 1)[:rows, :columns]
        stored[name] = codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
        stored[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous()
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (base / "config.json").write_text(json.dumps(config))
    return meant


def test_the_command_that_fp8_is_refused_with_writes_the_weights_that_are_meant(tmp_path: Path) -> None:
    base = toy.base_model(tmp_path / "base", torch.bfloat16, hidden_size=384, intermediate_size=256)
    meant = as_fp8(base)
    with pytest.raises(UserError, match='quant_method "fp8"') as refused:
        build(base)
    command = re.search(r"python -c .*$", str(refused.value), re.MULTILINE)
    assert command is not None
    subprocess.run([sys.executable, *shlex.split(command[0])[1:]], check=True, capture_output=True, timeout=240)
    written = load_file(tmp_path / "base-bf16" / "model.safetensors")
    for name, weight in meant.items():
        assert torch.equal(written[name], weight.bfloat16())
    assert len(build(tmp_path / "base-bf16").adapted) == 2 * 5


def test_fp8_with_blocks_that_are_not_whole_is_not_left_to_transformers(tmp_path: Path) -> None:
    """It takes 300 columns with three scales for blocks of 100."""
    as_fp8(toy.base_model(tmp_path / "base", torch.bfloat16, hidden_size=192, intermediate_size=300))
    with pytest.raises(UserError, match="give the model before quantisation$"):
        ModelFolder.open(tmp_path / "base")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A folder whose config.json ties the head to the embedding, though the files have both, and they differ."""
    base = toy.base_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return base


def test_what_is_tied_but_differs_is_used_as_transformers_does(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(tied))
    run = build(tied)
    assert torch.equal(logits(run.model), expected)
    assert "tie_word_embeddings = true, but the files hold 'lm_head.weight' and" in capsys.readouterr().err
    assert torch.equal(logits(load_for_inference(str(tied), "fp32")[0].cpu()), expected)


@pytest.mark.parametrize("module", ["model.layers.0.mlp.up_proj", "lm_head"])
def test_an_adapter_on_it_is_merged_as_it_was_trained(tied: Path, tmp_path: Path, module: str) -> None:
    rows = {"lm_head": 300}.get(module, 53)
    generator = torch.Generator().manual_seed(0)
    layer = AdapterLayer(torch.randn(2, 36, generator=generator), torch.randn(rows, 2, generator=generator), None, 1.0)
    write_peft_folder(tmp_path / "adapter", PeftAdapter(str(tied), 2, 2, 0.0, False, {module: layer}))
    consolidate(tmp_path / "adapter", tied, tmp_path / "merged", progress=False)
    unmerged, _ = load_for_inference(str(tmp_path / "adapter"), "fp32")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert toy.relative_error(logits(unmerged.cpu()), merged) < 1e-6
    assert toy.relative_error(logits(AutoModelForCausalLM.from_pretrained(tied)), merged) > 1e-3


@pytest.mark.parametrize("differs", [True, False])
def test_two_uses_of_a_weight_trained_apart_are_merged_apart(tmp_path: Path, tied: Path, differs: bool) -> None:
    """Both trained as they are in a base that holds them twice; or one as a module to save, which unties it."""
    base = tied if differs else toy.base_model(tmp_path / "shared", tie_word_embeddings=True)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    values = {name: torch.full((300, 36), 0.25 + place) for place, name in enumerate(names)}
    modules = [] if differs else ["model.embed_tokens"]
    adapter = PeftAdapter(str(base), 2, 2, 0.0, False, {}, trained=values, modules_to_save=modules)
    write_peft_folder(tmp_path / "adapter", adapter)
    consolidate(tmp_path / "adapter", base, tmp_path / "merged", progress=False)
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(merged[name], values[name]) for name in names)
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    evaluated, _ = load_for_inference(str(tmp_path / "adapter"), "fp32")
    assert torch.equal(logits(evaluated.cpu()), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))


def test_a_model_with_its_own_code_is_not_trained_in_full(tmp_path: Path) -> None:
    base = toy.base_model(tmp_path / "base")
    model = ModelConfig(path=str(base), trust_remote_code=True)
    full, config = AdapterConfig(method="full"), json.loads((base / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "a.A", "AutoModelForCausalLM": "b.B"}}
    (base / "config.json").write_text(json.dumps(config | own))  # of a kind that transformers has, too
    check_own_code(model, full, base)
    (base / "config.json").write_text(json.dumps(config | own | {"model_type": "own"}))
    check_own_code(model, AdapterConfig(), base)
    with pytest.raises(UserError, match="needs its own code.* checkpoint of full fine-tuning .* train an adapter"):
        check_own_code(model, full, base)


def test_two_copies_of_one_weight_stay_tied(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    model = build(tied).model
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    assert "warning" not in capsys.readouterr().err


def test_values_whose_sum_overflows_are_no_infinity(tmp_path: Path) -> None:
    base = toy.base_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert (build(base).model.get_parameter("model.layers.0.mlp.up_proj.weight") == 3e38).all()
