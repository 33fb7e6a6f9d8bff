"""A model from a Hugging Face folder or hub name, adapted and placed: the order of construction in one place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_dist.adapters.inject import inject
from dora_dist.adapters.linear import AdapterSpec
from dora_dist.adapters.norms import NormRefresher
from dora_dist.errors import UserError
from dora_dist.models.placement import Placement
from dora_dist.safetensors_io import TensorFolder
from dora_dist.zero3.loading import load_base

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class AdaptedModel:
    """A model ready to train: `norms` is attached to it, `base` is the folder that its weights came from."""

    model: nn.Module
    norms: NormRefresher
    adapted: list[str]
    base: Path
    base_bytes_read: int


def build_model(
    base: Path,
    adapter: AdapterSpec,
    placement: Placement,
    *,
    dtype: str = "bf16",
    target_modules: list[str] | None = None,
    magnitude_only_modules: list[str] | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    seed: int = 0,
) -> AdaptedModel:
    """Build, adapt and load a causal language model from a local folder; norms are refreshed before it returns.

    The skeleton is made without memory, the adapters are injected into it, and only then does each parameter get
    its place (whole, or this rank's shard). On ZeRO-3 this is collective. Raises UserError for a folder that is no
    model, patterns that match nothing, and missing, misshapen or truncated tensors.
    """
    folder = TensorFolder.open(base)
    model = skeleton(base, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
    adapted = inject(model, adapter, target_modules, magnitude_only_modules or [])
    load_base(model, folder, placement, DTYPES[dtype], seed)
    norms = placement.norms(model)
    norms.refresh()
    return AdaptedModel(model, norms, adapted, base, folder.bytes_read)


def skeleton(base: Path, *, attn_implementation: str = "sdpa", trust_remote_code: bool = False) -> nn.Module:
    """The model's modules with parameters on the meta device and real buffers (rotary frequencies and the like)."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {base} holds no readable config.json: {error}") from error
    config._attn_implementation = attn_implementation
    config.use_cache = False
    model_class = _model_class(config, trust_remote_code)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = model_class(config)
    model.tie_weights()
    if (base / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(base)
    return model


def _model_class(config: Any, trust_remote_code: bool) -> type[nn.Module]:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], config._name_or_path)
    raise UserError(
        f"model.path: {config.model_type!r} is not a causal language model that {AutoModelForCausalLM.__name__} knows"
    )
