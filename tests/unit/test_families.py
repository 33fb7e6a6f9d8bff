"""Families of models: what is registered is asked, and a new one needs nothing but its object."""

from typing import Any

import pytest
import torch
from torch import nn

from dora_dist.adapters.inject import inject
from dora_dist.adapters.methods import LowRank
from dora_dist.adapters.patterns import matches
from dora_dist.models import families
from dora_dist.models.families import adapter_plan, check_sees_pictures, family_of, family_of_parts, register
from dora_dist.models.family import Family
from dora_dist.runtime.errors import UserError


@pytest.fixture(autouse=True)
def forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))


def model(model_type: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        hidden_size=8, intermediate_size=9, num_hidden_layers=1, num_attention_heads=2, vocab_size=11
    )
    config.model_type = model_type
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_a_registered_family_has_its_default_targets_and_parts_that_an_ending_does_not_reach() -> None:
    register(Family(("toy",), targets=("q_proj", "down_proj"), apart=("mlp",)))
    with pytest.raises(UserError, match="'down_proj' matches no linear layer"):
        inject(model("toy"), adapter_plan(LowRank(2, 4.0)))
    assert inject(model("toy"), adapter_plan(LowRank(2, 4.0), ["mlp.down_proj"])) == ["model.layers.0.mlp.down_proj"]
    assert matches("q_proj", "layers.0.self_attn.q_proj", "", apart=("attn",))  # a part is a whole step of a name


def test_an_unknown_family_is_a_family_with_nothing_special() -> None:
    family = family_of("toy")
    assert family == Family(("toy",)) and not family.targets and not family.sees_pictures
    assert family.rename(nn.Identity()) is None
    with pytest.raises(UserError, match="'toy' has no default"):
        inject(model("toy"), adapter_plan(LowRank(2, 4.0)))


def test_a_model_type_has_one_family() -> None:
    with pytest.raises(ValueError, match="'mistral' is registered already"):
        register(Family(("toy", "mistral")))


def test_names_of_parts_tell_the_family() -> None:
    names = ["model.layers.0.mlp.down_proj", "model.language_model.layers.0.self_attn.q_proj"]
    assert family_of_parts(names[:1]) is None
    assert family_of_parts(names) is family_of("llava")
    register(Family(("toy",), parts=("layers",)))
    assert family_of_parts(names[:1]) is family_of("toy")


def test_pictures_are_for_families_that_see_them() -> None:
    check_sees_pictures(model("llava").config)
    with pytest.raises(UserError, match=r"'toy' with pictures is not supported; image_text_to_text is for llava \("):
        check_sees_pictures(model("toy").config)
    register(Family(("toy",), sees_pictures=True))
    check_sees_pictures(model("toy").config)
