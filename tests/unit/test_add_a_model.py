"""examples/add_a_model.py, the worked example of the documents: a family from outside of the package."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from dora_dist import build_model, consolidate
from dora_dist.config import AdapterConfig, ModelConfig
from dora_dist.models import families
from dora_dist.runtime.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "add_a_model.py"
LAYERS = 2


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=64
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's family, known in this test alone."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    spec = importlib.util.spec_from_file_location("add_a_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_model_of_no_known_family_has_no_default_targets(base: Path) -> None:
    with pytest.raises(UserError, match=r"adapter.target_modules is not set and the model family 'gpt_neox' has no"):
        build_model(base, AdapterConfig(r=4))


@pytest.mark.usefixtures("example")
def test_the_family_adapts_every_projection_and_nothing_else_and_trains(base: Path) -> None:
    run = build_model(ModelConfig(path=str(base), dtype="fp32"), AdapterConfig(r=4, lora_alpha=8.0))
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():  # also of the tensor that folders call otherwise
        expected = GPTNeoXForCausalLM.from_pretrained(base)(input_ids=tokens).logits
        torch.testing.assert_close(run.model(input_ids=tokens).logits, expected, rtol=0, atol=1e-6)
    kinds = ("attention.dense", "attention.query_key_value", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h")
    assert sorted(run.adapted) == [f"gpt_neox.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in kinds]
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        loss = run.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.usefixtures("example")
def test_a_merged_folder_keeps_the_names_that_its_base_has(base: Path, tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
    theirs = get_peft_model(GPTNeoXForCausalLM.from_pretrained(base), settings)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    consolidate(tmp_path / "adapter", base, tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as merged:
        assert "embed_out.weight" in set(merged.keys())
    tokens = torch.arange(16).view(1, 16)
    with torch.no_grad():
        found = GPTNeoXForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=tokens).logits
        torch.testing.assert_close(found, theirs.eval()(input_ids=tokens).logits, rtol=0, atol=1e-5)
