"""The tokens that stand for a picture in a LLaVA's input: how many, and whether for anything else."""

import copy
from typing import Any

import torch

from dora_dist.runtime.errors import UserError


def tokens_per_picture(
    config: Any,
    height: int,
    width: int,
    *,
    field: str = "model.path",
    remedy: str = "correct its preprocessor_config.json",
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


def other_use(tokenizer: Any, token_id: int) -> str | None:
    """What else a tokenizer uses the token of pictures for, such as "pad_token": each such token would be a picture."""
    names = ("pad_token", "eos_token", "bos_token")
    return next((name for name in names if getattr(tokenizer, f"{name}_id") == token_id), None)
