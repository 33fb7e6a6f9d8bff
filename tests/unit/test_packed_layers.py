"""Which layers of a model a packed storage holds, what they compute, and what a merge makes of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_dist.adapters.held import HeldLinear, held_linear, packed_modules
from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.native_format import NativeAdapter
from dora_dist.adapters.peft_format import PeftAdapter, open_peft_folder, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.adapters.storage import Int8, labelled
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.cli import main
from dora_dist.config import AdapterConfig, ModelConfig
from dora_dist.evaluation.inference import load_for_inference
from dora_dist.runtime.errors import UserError
from dora_dist.training.model import build_model
from tests import toy

O_PROJ = "model.layers.0.self_attn.o_proj"
NF4 = 'nf4 {"block_size": 128}'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.base_model(tmp_path_factory.mktemp("packed_layers") / "base")


def projections(base: Path) -> list[str]:
    return [n.removesuffix(".weight") for n in load_file(base / "model.safetensors") if n.endswith("_proj.weight")]


def test_the_numbered_layers_are_packed_adapted_or_not_and_a_head_never(base: Path) -> None:
    adapter = AdapterConfig(
        r=2, target_modules=["o_proj", "lm_head"], trained_parameters=[".*layers.1.*up_proj.weight"]
    )
    model = build_model(ModelConfig(path=str(base), storage="int8", dtype="fp32"), adapter).model
    packed = packed_modules(model)
    assert packed is not None and sorted(packed) == sorted(n for n in projections(base) if "1.mlp.up_proj" not in n)
    assert type(model.get_submodule("lm_head")) is AdaptedLinear
    assert type(model.get_submodule("model.layers.1.mlp.up_proj")) is nn.Linear
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is HeldLinear
    assert packed_modules(build_model(str(base), adapter).model) is None


def test_nothing_but_adapters_goes_with_a_packed_base(base: Path) -> None:
    with pytest.raises(UserError, match=r'model.storage = "int8": frozen weights under adapters.*set it to "plain"'):
        build_model(ModelConfig(path=str(base), storage="int8"), AdapterConfig(method="full"))


def test_a_model_with_nothing_to_pack_is_refused(base: Path) -> None:
    head_alone = AdapterConfig(r=2, target_modules=["lm_head"], trained_modules=["model.layers"])
    with pytest.raises(UserError, match=r'model.storage = "nf4": holds linear layers of the num.*none.*to "plain"'):
        build_model(ModelConfig(path=str(base), storage="nf4"), head_alone)


def test_a_layer_without_an_adapter_is_the_decoded_linear_layer() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(83, 50), torch.randn(3, 4, 83)
    decoded = nn.Linear(83, 50)
    with torch.no_grad():
        decoded.weight.copy_(Int8().round_trip(linear.weight.flatten()).view(50, 83))
        decoded.bias.copy_(linear.bias)
    held = held_linear(linear, Int8())
    assert held.bias is not None and not held.bias.requires_grad
    held.bias.requires_grad_(True)
    results = []
    for layer in (held, decoded):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.square().sum().backward()
        results.append((y, inputs.grad, layer.bias.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def adapter_of(base: Path, storage: str, packed: list[str] | None) -> PeftAdapter:
    """Of one projection: of all others nothing is left, or nothing was ever adapted."""
    shape = load_file(base / "model.safetensors")[f"{O_PROJ}.weight"].shape
    generator = torch.Generator().manual_seed(0)
    layer = AdapterLayer(
        lora_A=torch.randn(2, shape[1], generator=generator) * 0.1,
        lora_B=torch.randn(shape[0], 2, generator=generator) * 0.1,
        magnitude=None,
        scaling=1.0,
    )
    return PeftAdapter(
        base_model=str(base),
        lora_alpha=2.0,
        r=2,
        dropout=0.0,
        use_dora=False,
        layers={O_PROJ: layer},
        base_storage=storage,
        base_packed=packed,
    )


def expected(base: Path, adapter: PeftAdapter, storage: str | None) -> dict[str, Tensor]:
    tensors = load_file(base / "model.safetensors")
    for name in (adapter.base_packed or [O_PROJ]) if storage else []:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = labelled(storage or "", "").round_trip(weight.flatten()).view_as(weight)
    layer = adapter.layers[O_PROJ]
    assert layer.lora_A is not None and layer.lora_B is not None
    tensors[f"{O_PROJ}.weight"] += layer.lora_B @ layer.lora_A
    return tensors


@pytest.mark.parametrize("said", [True, False], ids=["all_layers", "as_before"])
def test_what_was_packed_is_merged_as_training_saw_it(said: bool, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, NF4, projections(base) if said else None)
    write_peft_folder(tmp_path / "adapter", adapter)
    result = consolidate(tmp_path / "adapter", base, tmp_path / "merged", progress=False)
    assert result["differences"] == {}
    merged, wanted = load_file(tmp_path / "merged/model.safetensors"), expected(base, adapter, NF4)
    for name, values in wanted.items():
        torch.testing.assert_close(merged[name], values, rtol=1e-5, atol=1e-7)
    model, _ = load_for_inference(str(tmp_path / "adapter"), "fp32")
    packed = packed_modules(model)
    assert packed is not None and sorted(packed) == sorted(adapter.base_packed or [O_PROJ])
    plain, _ = load_for_inference(str(tmp_path / "merged"), "fp32")
    with torch.no_grad():
        ours, theirs = (m(input_ids=toy.tokens()).logits for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_merge_into_the_bases_own_weights_says_how_far_it_is(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of(base, "nf4", projections(base))
    write_peft_folder(tmp_path / "adapter", adapter)
    output = ["--output", str(tmp_path / "merged")]
    assert main(["consolidate", str(tmp_path / "adapter"), *output, "--base-precision", "original"]) == 0
    said = capsys.readouterr().out.splitlines()
    merged, wanted = load_file(tmp_path / "merged/model.safetensors"), expected(base, adapter, None)
    seen = expected(base, adapter, "nf4")
    largest: dict[str, float] = {}
    for name, values in wanted.items():
        torch.testing.assert_close(merged[name], values, rtol=1e-5, atol=1e-7)
        layer = ".".join(name.split(".")[:3])
        difference = float((values - seen[name]).norm() / seen[name].norm())
        if name.endswith("_proj.weight"):
            largest[layer] = max(largest.get(layer, 0.0), difference)
    lines = [line for line in said if "differs by" in line]
    assert len(lines) == len(largest)
    for line, (layer, difference) in zip(lines, largest.items(), strict=True):
        assert line.startswith(f"{layer}.") and f"differs by {difference:.2%} from" in line


def test_folders_of_both_formats_say_what_was_packed(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, NF4, projections(base))
    write_peft_folder(tmp_path / "peft", adapter)
    folder = open_peft_folder(tmp_path / "peft")
    assert (folder.base_storage(), folder.base_packed()) == (NF4, projections(base))
    NativeAdapter(base_model="b", layers={}, base_storage=NF4, base_packed=["a.0"]).write(tmp_path / "own")
    config = json.loads((tmp_path / "own/dora_dist_adapter.json").read_text())
    assert (config["base_storage"], config["base_packed"]) == (NF4, ["a.0"])
    NativeAdapter(base_model="b", layers={}).write(tmp_path / "plain")
    assert "base_packed" not in json.loads((tmp_path / "plain/dora_dist_adapter.json").read_text())
