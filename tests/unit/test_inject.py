"""Which modules become adapters, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dora_dist.adapters.inject import by_pattern, inject
from dora_dist.adapters.linear import AdapterSpec, DoraLinear
from dora_dist.errors import UserError

SPEC = AdapterSpec(4, 8.0)


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, tie_word_embeddings=tied, **sizes))


def test_the_familys_default_is_the_papers_choice() -> None:
    model = llama()
    names = inject(model, by_pattern(SPEC))
    assert sorted({n.rpartition(".")[2] for n in names}) == [
        "down_proj",
        "k_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert len(names) == 10
    assert all(isinstance(model.get_submodule(n), DoraLinear) for n in names)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.{p}" for n in names for p in ("lora_A", "lora_B", "magnitude_offset")}


def test_names_suffixes_and_expressions() -> None:
    patterns = ["model.layers.0.self_attn.q_proj", "mlp.up_proj", r"model\.layers\.1\..*v_proj"]
    names = inject(llama(), by_pattern(SPEC, patterns))
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_the_frozen_weight_is_the_same_memory() -> None:
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    inject(model, by_pattern(SPEC, ["q_proj"]))
    assert model.model.layers[0].self_attn.q_proj.weight is weight


def test_magnitude_only_modules_have_no_factors() -> None:
    model = llama()
    inject(model, by_pattern(SPEC, ["q_proj"], ["o_proj"]))
    assert model.model.layers[0].self_attn.o_proj.spec.r is None
    assert model.model.layers[0].self_attn.q_proj.spec.r == 4


@pytest.mark.parametrize(
    ("plan", "tied", "says"),
    [
        (by_pattern(SPEC, ["query"]), False, r"'query' matches no linear layer.*q_proj \(2\)"),
        (by_pattern(SPEC, ["q_proj", "(["]), False, "regular expression"),
        (by_pattern(SPEC, ["q_proj"], ["q_proj"]), False, "both match"),
        (by_pattern(SPEC, ["lm_head"]), True, "shares its weight with model.embed_tokens.weight"),
        (lambda model: {"model.nothing": SPEC}, False, "'model.nothing' that this model does not have"),
    ],
)
def test_refusals_name_what_is_wrong(plan: object, tied: bool, says: str) -> None:
    with pytest.raises(UserError, match=says):
        inject(llama(tied), plan)


def test_an_unknown_family_without_patterns_is_refused() -> None:
    with pytest.raises(UserError, match="has no default"):
        inject(nn.Sequential(nn.Linear(2, 2)), by_pattern(SPEC))


def test_an_untied_head_can_be_adapted(tmp_path: Path) -> None:
    model = llama(tied=False)
    assert inject(model, by_pattern(SPEC, ["lm_head"])) == ["lm_head"]
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
