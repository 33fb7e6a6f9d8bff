"""PEFT folders, in and out; PEFT itself is the oracle."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dora_dist.adapters.peft_format import PeftAdapter, read_peft_folder, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.runtime.errors import UserError

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.arange(24).view(2, 12) % 61


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "vocab_size": 61,
    }
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()


def peft_folder(path: Path, **options: Any) -> torch.Tensor:
    """Save a PEFT adapter of random values over tiny_llama(); returns its logits."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
    } | options
    model = get_peft_model(tiny_llama(), LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.save_pretrained(str(path))
        return model(TOKENS).logits


def same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return left is not None and right is not None and torch.equal(left, right)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    peft_folder(path, use_dora=True)
    return path


def peft_logits(path: Path, base: LlamaForCausalLM | None = None) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(base or tiny_llama(), path).eval()(TOKENS).logits


def merged_logits(adapter: PeftAdapter, base: LlamaForCausalLM | None = None) -> torch.Tensor:
    """The formula of the merge, in fp64, applied to the base in place."""
    model: Any = (base or tiny_llama()).double()
    for name, layer in adapter.layers.items():
        weight = model.get_parameter(f"{name}.weight").data
        if layer.lora_A is not None and layer.lora_B is not None:
            weight += layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        if layer.magnitude is not None:
            norm = weight.square().sum(1).sqrt()
            weight *= torch.where(norm == 0, 1.0, layer.magnitude.double() / norm)[:, None]
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_dora": False},
        {"use_dora": True, "use_rslora": True},
        {
            "use_dora": True,
            "rank_pattern": {"down_proj": 2, r"layers\.0\..*q_proj": 6},
            "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 3, "q_proj": 5},
        },
    ],
    ids=["dora", "lora", "rslora", "patterns"],
)
def test_peft_adapter_reads_and_writes_with_the_same_logits(tmp_path: Path, options: dict) -> None:
    expected = peft_folder(tmp_path / "peft", **options)
    adapter = read_peft_folder(tmp_path / "peft")
    assert len(adapter.layers) == 6
    assert (expected - merged_logits(adapter)).abs().max() < 1e-5
    write_peft_folder(tmp_path / "ours", adapter)
    torch.testing.assert_close(peft_logits(tmp_path / "ours"), expected, atol=1e-6, rtol=0)
    again = read_peft_folder(tmp_path / "ours")
    for name, layer in adapter.layers.items():
        assert same(layer.lora_A, again.layers[name].lora_A)
        assert again.layers[name].scaling == pytest.approx(layer.scaling, rel=1e-12)
    assert (again.r, again.lora_alpha, again.use_dora) == (4, 8, options["use_dora"])


def test_defaults_are_read_from_the_config(tmp_path: Path) -> None:
    peft_folder(tmp_path / "peft", use_dora=True, lora_dropout=0.05, rank_pattern={"q_proj": 2}, revision="v1")
    adapter = read_peft_folder(tmp_path / "peft")
    assert (adapter.r, adapter.lora_alpha, adapter.dropout, adapter.use_dora) == (4, 8, 0.05, True)
    assert (adapter.base_model, adapter.task_type, adapter.revision) == ("", "CAUSAL_LM", "v1")
    layer = adapter.layers["model.layers.0.self_attn.q_proj"]
    assert layer.lora_A is not None and layer.lora_A.shape == (2, 32) and layer.lora_A.dtype == torch.float32
    assert layer.lora_B is not None and layer.lora_B.shape == (32, 2) and layer.scaling == 4.0
    assert adapter.layers["model.layers.1.mlp.down_proj"].scaling == 2.0


def test_layers_that_differ_from_the_defaults_get_patterns(tmp_path: Path) -> None:
    def layer(r: int, alpha: float, size: tuple[int, int] = (32, 32)) -> AdapterLayer:
        return AdapterLayer(torch.randn(r, size[1]) / 5, torch.randn(size[0], r) / 5, torch.rand(size[0]), alpha / r)

    torch.manual_seed(3)
    names = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    layers = dict(zip(names, [layer(4, 8), layer(3, 8), layer(4, 2.5, (32, 56))], strict=True))
    adapter = PeftAdapter("base", lora_alpha=8, r=4, dropout=0.1, use_dora=True, layers=layers)
    write_peft_folder(tmp_path / "out", adapter)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["rank_pattern"] == {f"^{names[1]}": 3} and config["alpha_pattern"] == {f"^{names[2]}": 2.5}
    assert config["base_model_name_or_path"] == "base" and config["lora_dropout"] == 0.1
    torch.testing.assert_close(peft_logits(tmp_path / "out"), merged_logits(adapter), atol=1e-5, rtol=0)


def test_magnitude_only_modules_survive_peft_and_a_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(4)
    name = "model.layers.0.self_attn.o_proj"
    magnitude = torch.rand(32) + 0.1
    fresh = AdapterLayer(torch.randn(4, 32), torch.zeros(32, 4), torch.rand(32), 2.0)  # B = 0 is no placeholder
    layers = {name: AdapterLayer(None, None, magnitude, 2.0, in_features=32), name.replace("o_", "q_"): fresh}
    adapter = PeftAdapter("", lora_alpha=8, r=4, dropout=0.0, use_dora=True, layers=layers)
    write_peft_folder(tmp_path / "out", adapter)
    torch.testing.assert_close(peft_logits(tmp_path / "out"), merged_logits(adapter), atol=1e-5, rtol=0)
    again = read_peft_folder(tmp_path / "out")
    assert again.layers[name].lora_A is None and again.layers[name].lora_B is None
    assert same(again.layers[name].magnitude, magnitude)
    assert again.layers[name].in_features == 32
    assert same(again.layers[name.replace("o_", "q_")].lora_A, fresh.lora_A)


def test_zero_rows_give_peft_finite_logits(tmp_path: Path) -> None:
    def base() -> LlamaForCausalLM:
        model = tiny_llama()
        for name in names:
            model.get_parameter(f"{name}.weight").data[5:9] = 0
        return model

    names = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    torch.manual_seed(5)
    norms = [base().get_parameter(f"{name}.weight").data.norm(dim=1) for name in names]
    lora_B = torch.randn(32, 4) / 5
    lora_B[5:9] = 0
    layers = {
        names[0]: AdapterLayer(torch.randn(4, 32), lora_B, norms[0] * 1.5, 2.0),
        names[1]: AdapterLayer(None, None, norms[1] * 0.5, 2.0, in_features=32),
    }
    adapter = PeftAdapter("", lora_alpha=8, r=4, dropout=0.0, use_dora=True, layers=layers)
    write_peft_folder(tmp_path / "out", adapter)
    expected = merged_logits(adapter, base())
    torch.testing.assert_close(peft_logits(tmp_path / "out", base()), expected, atol=1e-5, rtol=0)
    again = read_peft_folder(tmp_path / "out")
    assert again.layers[names[1]].lora_A is None
    torch.testing.assert_close(merged_logits(again, base()), expected, atol=1e-6, rtol=0)


def test_bf16_adapter_keeps_magnitudes_in_fp32(tmp_path: Path) -> None:
    peft_folder(tmp_path / "peft", use_dora=True)
    adapter = read_peft_folder(tmp_path / "peft")
    write_peft_folder(tmp_path / "out", adapter, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {str(t.dtype) for n, t in stored.items() if "magnitude" in n} == {"torch.float32"}
    assert {str(t.dtype) for n, t in stored.items() if "lora_A" in n} == {"torch.bfloat16"}
    torch.testing.assert_close(peft_logits(tmp_path / "out"), merged_logits(read_peft_folder(tmp_path / "out")))


def test_write_refuses_an_existing_folder_and_mixed_layers(tmp_path: Path) -> None:
    layer = AdapterLayer(torch.ones(1, 2), torch.ones(3, 1), None, 1.0)
    adapter = PeftAdapter("", lora_alpha=1, r=1, dropout=0.0, use_dora=False, layers={"m": layer})
    write_peft_folder(tmp_path / "out", adapter)
    with pytest.raises(UserError, match="out: already exists"):
        write_peft_folder(tmp_path / "out", adapter)
    layer.scaling = 3.0
    write_peft_folder(tmp_path / "out", adapter, overwrite=True)
    assert read_peft_folder(tmp_path / "out").layers["m"].scaling == 3.0
    adapter.layers["n"] = AdapterLayer(torch.ones(1, 2), torch.ones(3, 1), torch.ones(3), 1.0)
    with pytest.raises(ValueError, match="n: use_dora=False"):
        write_peft_folder(tmp_path / "mixed", adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type='ADALORA'"),
        ({"bias": "some"}, "bias='some' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"some_future_field": 1}, "some_future_field=1"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base"),
        ({"r": 5}, "with r=5 they must be"),
        ({"r": "4"}, "r='4' must be a positive number"),
        ({"lora_alpha": -1}, "lora_alpha=-1 must be"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"alpha_pattern": {"(q_proj": 1}}, r"bad pattern '\(q_proj'"),
        ({"alpha_pattern": [1]}, "alpha_pattern must map"),
        ({"use_dora": False}, "lora_A, lora_B, magnitude, but with use_dora=False"),
    ],
)
def test_unsupported_configs_name_the_field(tmp_path: Path, saved: Path, change: dict, message: str) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        read_peft_folder(tmp_path)


def test_unreadable_folders_are_user_errors(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(UserError, match="no adapter_config.json"):
        read_peft_folder(tmp_path)
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    save_file(tensors | {name.replace("lora_A", "lora_embedding_A"): torch.ones(1)}, weights)
    with pytest.raises(UserError, match="lora_embedding_A.weight' is not supported"):
        read_peft_folder(tmp_path)
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    with pytest.raises(UserError, match=r"q_proj' has lora_B, magnitude, but with use_dora=True"):
        read_peft_folder(tmp_path)
    save_file(tensors | {name: torch.ones(4, 4, 1, 1)}, weights)
    with pytest.raises(UserError, match=r"q_proj' has .*\(4, 4, 1, 1\)"):
        read_peft_folder(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled .bin adapters are never loaded"):
        read_peft_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="adapter_config.json: not readable as JSON"):
        read_peft_folder(tmp_path)


@pytest.mark.parametrize("part", ["modules_to_save", "original_module"])
def test_what_is_inside_pefts_wrapper_of_a_trained_module_is_not_lost_in_silence(
    tmp_path: Path, saved: Path, part: str
) -> None:
    """Only biases are there twice, with bias="all"; a head under such a name alone is the only copy that there is."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file, name = tmp_path / "adapter_model.safetensors", f"base_model.model.lm_head.{part}"
    tensors, head = load_file(file), torch.ones(4, 4)
    save_file({**tensors, f"{name}.weight": head}, file)
    with pytest.raises(UserError, match=rf"lm_head\.{part}\.weight' is from inside PEFT's wrapper"):
        read_peft_folder(tmp_path)
    own = {"base_model.model.lm_head.weight": head, "base_model.model.lm_head.bias": head[0].clone()}
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["lm_head"], "bias": "all"}))
    save_file({**tensors, **own, f"{name}.bias": head[0].clone()}, file)
    assert set(read_peft_folder(tmp_path).trained) == {"lm_head.weight", "lm_head.bias"}
    del own["base_model.model.lm_head.bias"]
    save_file({**tensors, **own, f"{name}.bias": head[0].clone()}, file)
    with pytest.raises(UserError, match="is from inside PEFT's wrapper"):
        read_peft_folder(tmp_path)


def test_single_parameters_are_in_the_folder_and_peft_loads_them(tmp_path: Path) -> None:
    """All biases and norms of a BART, as VL-BART trains them; a tied embedding, and a norm's weight alone."""
    from transformers import BartConfig, BartForConditionalGeneration

    from dora_dist.adapters.patterns import parameters_matching
    from dora_dist.adapters.trained_parameters import TrainedParameters

    def bart() -> Any:
        torch.manual_seed(0)
        sizes = {"d_model": 32, "vocab_size": 61, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        return BartForConditionalGeneration(BartConfig(**sizes, **layers)).eval()

    def with_values(patterns: list[str]) -> tuple[Any, dict[str, torch.Tensor]]:
        model = bart()
        names = parameters_matching(model, patterns)
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)) * 0.1)
        return model, {name: model.get_parameter(name).detach() for name in names}

    q_proj = "model.encoder.layers.0.self_attn.q_proj"
    layer = AdapterLayer(torch.zeros(2, 32), torch.zeros(32, 2), None, 1.0)
    for number, patterns in enumerate((["bias", r".*norm.*\.weight"], ["lm_head.weight", "final_layer_norm.weight"])):
        expected, trained = with_values(patterns)
        own = TrainedParameters.of(expected, list(trained), [])
        adapter = PeftAdapter("", 2.0, 2, 0.0, False, {q_proj: layer}, task_type="SEQ_2_SEQ_LM", trained=trained)
        adapter.modules_to_save, adapter.all_biases = list(own.modules), own.all_biases
        assert own.all_biases == (number == 0) == bool(own.modules)
        write_peft_folder(tmp_path / str(number), adapter)
        with torch.no_grad():
            logits = expected(TOKENS).logits
            loaded: Any = PeftModel.from_pretrained(bart(), str(tmp_path / str(number))).eval()
            assert torch.equal(loaded(TOKENS).logits, logits)
            loaded.save_pretrained(str(tmp_path / f"again-{number}"))
            if number == 0:
                again = PeftModel.from_pretrained(bart(), str(tmp_path / "again-0")).eval()
                assert torch.equal(again(TOKENS).logits, logits)
        ours = read_peft_folder(tmp_path / str(number))
        assert set(ours.trained) == set(trained) and all(same(ours.trained[name], trained[name]) for name in trained)
    theirs = read_peft_folder(tmp_path / "again-0")
    assert set(theirs.trained) == set(with_values(["bias", r".*norm.*\.weight"])[1])
