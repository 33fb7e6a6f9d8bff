"""The families of models that are known, and what a run or a command asks of the one at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dora_dist.adapters.inject import AdapterPlan, by_pattern
from dora_dist.adapters.method import AdapterMethod, Method
from dora_dist.adapters.patterns import ParameterPlan, parameters_matching
from dora_dist.models import logits
from dora_dist.models.family import Family
from dora_dist.models.folder import transformers_config
from dora_dist.models.llava.family import LLAVA
from dora_dist.models.vl_bart.family import VL_BART, Bart
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from dora_dist.config import DataConfig
    from dora_dist.data.pictures import PictureProcessor

# The choice of the DoRA paper (section 5.1).
_LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# Encoders: query, key, value, attention output, intermediate and output, as Mao et al. (arXiv 2405.17357) have it.
_BERT_LIKE = ("query", "key", "value", "intermediate.dense", "output.dense")
# The same six of an encoder-decoder: every projection of its three kinds of attention, and both feed-forward layers.
_BART = ("q_proj", "k_proj", "v_proj", "self_attn.out_proj", "encoder_attn.out_proj", "fc1", "fc2")

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known for each of its `model_types`. Raises ValueError for one that is known already."""
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise ValueError(f"a family for model_type {model_type!r} is registered already")
        _FAMILIES[model_type] = family


register(
    Family(
        ("llama", "mistral", "qwen2", "qwen3"), _LLAMA_LIKE, masks_are_free=True, packs=True, logits=logits.unchanged
    )
)
register(Family(("gemma", "smollm3"), _LLAMA_LIKE, packs=True, logits=logits.unchanged))
register(Family(("gemma2",), _LLAMA_LIKE, packs=True, logits=logits.soft_capped))
register(Family(("granite",), _LLAMA_LIKE, packs=True, logits=logits.scaled))
register(Family(("bert", "roberta", "xlm-roberta", "electra"), _BERT_LIKE))
register(Family(("deberta-v2",), ("query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense")))
register(Bart(("bart",), _BART, logits=logits.shifted))
register(VL_BART)
register(Family(("mpnet",), ("attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense")))
register(LLAVA)


def family_of(model_type: str) -> Family:
    """The family of a config.json's `model_type`; of one that is not registered, a family with nothing special."""
    return _FAMILIES.get(model_type) or Family((model_type,))


def family_of_model(model: nn.Module) -> Family:
    """The family of a model of transformers; for any other module, a family of no name."""
    from transformers import PreTrainedModel  # seconds

    return family_of(model.config.model_type) if isinstance(model, PreTrainedModel) else Family(("",))


def family_of_parts(names: Iterable[str]) -> Family | None:
    """The family that modules or parameters called `names` can only be of, by its `parts`."""
    steps = {step for name in names for step in name.split(".")}
    families = dict.fromkeys(_FAMILIES.values())
    return next((family for family in families if steps.intersection(family.parts)), None)


def adapter_plan(
    method: Method, target_modules: Sequence[str] | None = None, magnitude_only: Sequence[str] = ()
) -> AdapterPlan:
    """`by_pattern` as the family of the model understands patterns; None means the family's own `targets`.

    The plan raises UserError where a family has none. No layer is adapted by a method that is not an AdapterMethod.
    """
    if not isinstance(method, AdapterMethod):
        return lambda model: {}

    def plan(model: nn.Module) -> dict[str, AdapterMethod]:
        family = family_of_model(model)
        patterns = family.targets if target_modules is None else target_modules
        if target_modules is None and not patterns:
            known = ", ".join(name for name, known in _FAMILIES.items() if known.targets)
            raise UserError(
                f"adapter.target_modules is not set and the model family {family.model_types[0]!r} has no default; "
                f"name the modules to adapt (families with a default: {known})"
            )
        return by_pattern(method, patterns, magnitude_only, apart=family.apart)(model)

    return plan


def trained_parameters(
    method: Method, target_modules: Sequence[str] | None = None, patterns: Sequence[str] = ()
) -> ParameterPlan:
    """What a method trains of a model's own parameters, and those that `patterns` name besides."""

    def names(model: nn.Module) -> list[str]:
        apart = family_of_model(model).apart
        own = method.trained(model, target_modules, apart=apart)
        return list(dict.fromkeys([*own, *parameters_matching(model, patterns, apart=apart)]))

    return names


def check_sees_pictures(config: Any) -> None:
    """Raise UserError for the configuration of a model that does not read pictures, or in a way that is not known."""
    if not family_of(config.model_type).sees_pictures:
        known = ", ".join(name for name, family in _FAMILIES.items() if family.sees_pictures)
        raise UserError(
            f"model.path: {config.model_type!r} with pictures is not supported; image_text_to_text is for "
            f"{known} (LLaVA-1.5 and what `dora-dist assemble-llava` makes)"
        )


def check_packs(config: Any) -> None:
    """Raise UserError for the configuration of a model whose language model might mix samples of one row."""
    language = config.get_text_config().model_type
    if not family_of(language).packs:
        known = ", ".join(name for name, family in _FAMILIES.items() if family.packs)
        raise UserError(
            f"data.packing = true: whether {language!r} keeps the records of a row apart is not known; set it to false "
            f"(known to: {known})"
        )


def load_processor(base: Path, data: DataConfig, tokenizer: str | None = None) -> PictureProcessor:
    """What turns conversations into the input of the model in the folder `base`, as its family has it.

    `tokenizer` names another than the folder's. Raises UserError if the parts do not fit together.
    """
    config = transformers_config(base)
    check_sees_pictures(config)
    return family_of(config.model_type).processor(base, config, data, tokenizer=tokenizer)
