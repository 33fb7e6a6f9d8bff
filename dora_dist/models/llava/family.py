"""LLaVA: a vision tower and a projector in front of a language model; what it needs beyond any other model."""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_dist.models.family import Family
from dora_dist.models.logits import Logits, unchanged
from dora_dist.weights.names import Rename, rename_for

if TYPE_CHECKING:
    from dora_dist.config import DataConfig
    from dora_dist.data.pictures import PictureProcessor

TOWER, PROJECTOR, LANGUAGE = "vision_tower", "multi_modal_projector", "language_model"
"""Names of modules."""


@dataclass(frozen=True)
class Llava(Family):
    """LLaVA-1.5 and what `assemble_llava` makes."""

    model_types: tuple[str, ...] = ("llava",)
    # Liu et al. (arXiv 2402.09353, section 5.4) adapt all seven projections of LLaVA's language model.
    targets: tuple[str, ...] = (rf".*\b{LANGUAGE}\..*\.(q|k|v|o|gate|up|down)_proj",)
    parts: tuple[str, ...] = (TOWER, PROJECTOR, LANGUAGE)
    apart: tuple[str, ...] = (TOWER, PROJECTOR)
    trained: tuple[str, ...] = (PROJECTOR,)
    sees_pictures: bool = True
    logits: Logits | None = unchanged

    def rename(self, model: Any) -> Rename | None:
        return rename_for(model)

    def prepare_for_training(self, model: Any) -> None:
        """Make an adapted LLaVA fit for ranks that see different batches, in place.

        A frozen tower stays in evaluation mode whatever `train()` says, and computes no gradients: for activation
        checkpointing transformers requests the gradients of its patch embeddings, which would cost a backward pass
        of the whole tower, all of its activations, and a second gather of its weights. The check that there are as
        many placeholders as features is done on the device, where transformers would wait for it in every forward.
        """
        tower = model.model.vision_tower
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.train = types.MethodType(_stay_in_evaluation, tower)
            tower.eval()
            tower.forward = torch.no_grad()(tower.forward)
        model.model.get_placeholder_mask = _without_waiting(model)

    def processor(self, base: Path, config: Any, data: DataConfig, *, tokenizer: str | None) -> PictureProcessor:
        from dora_dist.models.llava.processor import load_processor  # pictures and their libraries

        return load_processor(base, config, data, tokenizer=tokenizer)


LLAVA = Llava()


def _without_waiting(model: Any) -> Any:
    """`get_placeholder_mask` of transformers' LLaVA for `model`, without its synchronisation with the device.

    A batch without placeholders may come with a picture that nothing refers to: every rank then runs tower and
    projector, which ZeRO-3's collectives need, and the projector gets a gradient of zeros.
    """
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

    return get_placeholder_mask


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)
