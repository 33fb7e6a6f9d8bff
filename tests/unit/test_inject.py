"""Which modules become adapters, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dora_dist.adapters.inject import by_pattern, inject
from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.methods import DynamicRank, FullFineTuning, LowRank, WeightDecomposed
from dora_dist.adapters.norms import NormRefresher
from dora_dist.adapters.patterns import parameters_matching
from dora_dist.adapters.storage import Int8
from dora_dist.models.families import adapter_plan, trained_parameters
from dora_dist.runtime.errors import UserError

SPEC = WeightDecomposed(LowRank(4, 8.0))


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, tie_word_embeddings=tied, **sizes))


def test_the_familys_default_is_the_papers_choice() -> None:
    model = llama()
    names = inject(model, adapter_plan(SPEC))
    assert sorted({n.rpartition(".")[2] for n in names}) == [
        "down_proj",
        "k_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert len(names) == 10
    assert all(isinstance(model.get_submodule(n), AdaptedLinear) for n in names)
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
    assert model.model.layers[0].self_attn.o_proj.method.r == 0
    assert model.model.layers[0].self_attn.q_proj.method.r == 4


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
        inject(nn.Sequential(nn.Linear(2, 2)), adapter_plan(SPEC))


def test_an_untied_head_can_be_adapted(tmp_path: Path) -> None:
    model = llama(tied=False)
    assert inject(model, by_pattern(SPEC, ["lm_head"])) == ["lm_head"]
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_model_with_weights_starts_as_pefts_freshly_adapted_one() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = llama().eval()
    ids = torch.randint(32, (2, 9))
    before = model(ids).logits
    fresh = llama()
    fresh.load_state_dict(model.state_dict())
    targets = ["q_proj", "down_proj"]
    theirs = get_peft_model(
        fresh, LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=targets)
    ).base_model.model

    names = inject(model, by_pattern(SPEC, targets))
    NormRefresher(model).refresh()
    for name in names:
        ours, peft = model.get_submodule(name), theirs.get_submodule(name)
        bound = 1 / ours.in_features**0.5
        for values in (ours.lora_A, peft.lora_A["default"].weight):
            assert bound * 0.8 < values.abs().max() <= bound
            assert abs(float(values.detach().std()) / (bound / 3**0.5) - 1) < 0.35  # 64 numbers at least
        assert not ours.lora_B.any()
        assert not peft.lora_B["default"].weight.any()
        magnitude = ours.base_norm + ours.magnitude_offset
        theirs_too = peft.lora_magnitude_vector["default"].weight
        assert ((magnitude - theirs_too).abs() <= 1.2e-7 * theirs_too).all()  # one unit in the last place of fp32
    assert torch.equal(model(ids).logits, before)
    assert (theirs(ids).logits - before).abs().max() < 1e-5


def test_gates_of_the_papers_form_start_at_zero_on_a_model_with_weights() -> None:
    model = llama()
    method = WeightDecomposed(DynamicRank(4, 8.0, component_init="paper"))
    inject(model, by_pattern(method, ["q_proj"], ["o_proj"]))
    layer = model.model.layers[0].self_attn
    assert not layer.q_proj.lora_gates.any()
    assert layer.q_proj.lora_A.any()
    assert layer.q_proj.lora_B.any()
    assert not layer.o_proj.magnitude_offset.any()


def test_a_quantised_weight_is_refused_by_name() -> None:
    model = llama()
    packed = nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)  # as bitsandbytes' 4-bit layers
    model.model.layers[0].self_attn.q_proj.weight = packed
    with pytest.raises(UserError, match=r"'model.layers.0.self_attn.q_proj' has a quantised weight \(uint8\)"):
        inject(model, by_pattern(WeightDecomposed(LowRank(1)), ["q_proj"]))


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_single_parameters_are_trained_besides_the_adapters() -> None:
    model = llama()
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    names = trained_parameters(SPEC, ["q_proj"], ["bias", r"model\.norm\.weight"])(model)
    assert len(names) == 2 * 7 + 1 + 1 and "model.layers.0.self_attn.q_proj.bias" in names
    adapted = inject(model, by_pattern(SPEC, ["q_proj"]), trained_parameters=names)
    assert trains(model) == {*names, *(f"{n}.{p}" for n in adapted for p in ("lora_A", "lora_B", "magnitude_offset"))}


def test_a_tied_parameter_is_trained_once_under_any_of_its_names() -> None:
    model = llama(tied=True)
    assert parameters_matching(model, ["lm_head.weight"]) == ["model.embed_tokens.weight"]
    assert inject(model, lambda model: {}, trained_parameters=["model.embed_tokens.weight"]) == []
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (
            "bias",
            r"adapter.trained_parameters: 'bias' matches no parameter of this model; it has: q_proj.weight \(2\),",
        ),
        ("q_proj.weight", "is the weight of a layer that adapter.target_modules adapts, which stays frozen"),
        ("(", "adapter.trained_parameters: '\\(' is neither a module name nor a regular expression"),
    ],
)
def test_single_parameters_that_cannot_be_trained_are_refused(pattern: str, says: str) -> None:
    model = llama()
    with pytest.raises(UserError, match=says):
        inject(model, by_pattern(SPEC, ["q_proj"]), trained_parameters=parameters_matching(model, [pattern]))


def test_full_fine_tuning_adapts_nothing_and_trains_the_whole_model_or_chosen_modules() -> None:
    full, model = FullFineTuning(), llama(tied=True)
    assert adapter_plan(full)(model) == {}
    whole = trained_parameters(full)(model)
    assert whole == [name for name, _ in model.named_parameters()]
    chosen = trained_parameters(full, ["layers.1", "lm_head"])(model)
    assert chosen == [n for n in whole if "layers.1." in n or "embed_tokens" in n]
    with pytest.raises(UserError, match="adapter.target_modules: 'score' matches no module with parameters"):
        trained_parameters(full, ["score"])(model)
    assert trained_parameters(SPEC)(model) == []


def test_a_packed_layer_that_the_model_does_not_have_is_named() -> None:
    model = llama()
    with pytest.raises(UserError, match="packed weight of 'h.7.up', which is no linear layer of this model: another"):
        inject(model, by_pattern(SPEC, ["q_proj"]), storage=Int8(), packed=lambda model: ["h.7.up"])
