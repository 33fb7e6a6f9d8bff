"""LLaVA: a vision tower and a projector in front of a language model; what it needs beyond any other model."""

import copy
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.runtime.errors import UserError

LLAVA_PARTS = TOWER, PROJECTOR, LANGUAGE = "vision_tower", "multi_modal_projector", "language_model"
"""Names of modules."""
MODEL_TYPES = ("llava",)


def check_family(config: Any) -> None:
    """Raise UserError for a model that reads pictures in another way than LLaVA."""
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"model.path: {config.model_type!r} with pictures is not supported; image_text_to_text is for "
            f"{', '.join(MODEL_TYPES)} (LLaVA-1.5 and what `dora-dist assemble-llava` makes)"
        )


def is_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is LLaVA's."""
    return config.get("model_type") in MODEL_TYPES


def other_use(tokenizer: Any, token_id: int) -> str | None:
    """What a tokenizer has a token for beside pictures: "pad_token", say. Each such token would be a picture."""
    names = ("pad_token", "eos_token", "bos_token")
    return next((name for name in names if getattr(tokenizer, f"{name}_id") == token_id), None)


def prepare_for_training(model: Any) -> None:
    """Make an adapted LLaVA fit for ranks that see different batches, in place.

    A frozen tower stays in evaluation mode whatever `train()` says, and computes no gradients: transformers asks for
    those of its patch embeddings where activations are checkpointed, which would cost a backward pass of the whole
    tower, all of its activations, and a second gather of it. A batch without placeholders may come with a picture
    that nothing refers to: every rank then runs tower and projector, which ZeRO-3's collectives need, and the
    projector gets a gradient of zeros. That placeholders and features are as many is checked on the device, which
    transformers would wait for in every forward.
    """
    tower = model.model.vision_tower
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.train = types.MethodType(_stay_in_evaluation, tower)
        tower.eval()
        tower.forward = torch.no_grad()(tower.forward)
    find_placeholders = model.model.get_placeholder_mask

    def get_placeholder_mask(input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        if input_ids is not None:
            mask = (input_ids == model.config.image_token_id).unsqueeze(-1).expand_as(inputs_embeds)
            count = mask.sum()
            torch._assert_async(
                (count == 0) | (count == image_features.numel()), "Image features and image tokens do not match"
            )
            return mask
        found: Tensor = find_placeholders(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)
        return found

    model.model.get_placeholder_mask = get_placeholder_mask


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def tokens_per_picture(
    config: Any,
    height: int,
    width: int,
    field: str = "model.path",
    remedy: str = "mend its preprocessor_config.json",
) -> int:
    """How many features, so placeholders, a picture of `height` x `width` pixels gets; computes no feature.

    `config` is a LlavaConfig. Raises UserError, naming `field` and `remedy`, if the tower does not take such a picture.
    """
    from transformers.modeling_utils import set_zero3_state
    from transformers.models.llava.modeling_llava import LlavaModel

    small = copy.deepcopy(config)
    small.text_config.num_hidden_layers = 1
    with torch.device("meta"), set_zero3_state():
        model = LlavaModel(small)
        pixels = torch.empty(1, config.vision_config.num_channels, height, width, dtype=model.dtype)
        try:
            features = model.get_image_features(
                pixels,
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
            ).pooler_output
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{field}: pictures are made {height} x {width} pixels, which the vision tower refuses: {error}; "
                f"{remedy}"
            ) from error
    return int(features[0].shape[0])
