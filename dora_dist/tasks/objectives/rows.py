"""Samples that share a row do not see one another: what a language model's attention is given for packed rows."""

from __future__ import annotations

import sys
from typing import Any

import torch

from dora_dist.tasks.objectives.base import Batch


def apart(batch: Batch, model: Any) -> Batch:
    """A packed batch (`RowCollator`) as a `model` of transformers takes it, with its samples kept apart.

    flash_attention_2 gets the samples' lengths and reads each by itself. Any other attention gets the masks that
    transformers makes for the model, one for each kind of its layers, and-ed with "of the same sample": square in a
    row's length, made on the batch's device, where nothing waits for it. transformers would find the samples by
    position_ids alone, but in a way that waits for the device in every forward.
    """
    from transformers.masking_utils import create_causal_mask, create_masks_for_generate, packed_sequence_mask_function

    rest = {name: value for name, value in batch.items() if name not in ("segments", "bounds", "longest")}
    segments = batch["segments"]
    config = model.config.get_text_config()
    if config._attn_implementation.startswith("flash"):
        bounds, longest = batch["bounds"], batch["longest"]
        lengths = {f"cu_seq_lens_{of}": bounds for of in "qk"} | {f"max_length_{of}": longest for of in "qk"}
        return {**rest, **lengths}
    # A window in the configuration of a model whose code has none (LLaMA's) means nothing to it.
    windows = hasattr(sys.modules[type(model.get_decoder()).__module__], "create_sliding_window_causal_mask")
    masks = create_masks_for_generate if windows else create_causal_mask
    shape = torch.empty(*segments.shape, 1, dtype=model.dtype, device=segments.device)
    mask = masks(
        config,
        inputs_embeds=shape,
        attention_mask=None,
        past_key_values=None,
        and_mask_function=packed_sequence_mask_function(segments),
    )
    return {**rest, "attention_mask": mask}


def tokens(batch: Batch) -> int:
    """How many tokens of a batch in host memory are not padding."""
    return int((batch["segments"] >= 0).sum())
