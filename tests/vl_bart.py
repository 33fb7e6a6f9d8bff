"""A small VL-BART, and batches of texts with visual features."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_dist.models.vl_bart.modeling import VLBartConfig, VLBartForConditionalGeneration
from tests import summaries

FEATURE_DIM = 7
VOCABULARY = 90


def config(**changes: Any) -> VLBartConfig:
    return VLBartConfig(**{**summaries.SIZES, "vocab_size": VOCABULARY, "feature_dim": FEATURE_DIM, **changes})


def model(**changes: Any) -> Any:
    """With random weights, in evaluation mode; LayerNorms and biases are random, too."""
    torch.manual_seed(0)
    made = VLBartForConditionalGeneration(config(**changes)).eval()
    for parameter in made.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    torch.nn.init.normal_(made.final_logits_bias)
    return made


def base_model(folder: Path, **changes: Any) -> Path:
    """A folder of model_type "vl_bart", with a tokenizer."""
    text = summaries.tokenizer([value for record in summaries.records(30) for value in record.values()])
    model(vocab_size=len(text), **changes).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def batch(rows: int = 3, text: int = 6, visual: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """Texts and features without padding; the second half of the features is of another image."""
    generator = torch.Generator().manual_seed(seed)
    first = visual - visual // 2
    images = torch.tensor([0] * first + [1] * (visual - first))
    corners = torch.rand(rows, visual, 2, 2, generator=generator).sort(dim=2).values
    return {
        "input_ids": torch.randint(3, VOCABULARY - 20, (rows, text), generator=generator),
        "attention_mask": torch.ones(rows, text, dtype=torch.int64),
        "visual_features": torch.randn(rows, visual, FEATURE_DIM, generator=generator),
        "visual_boxes": corners.flatten(2),
        "visual_images": images.expand(rows, visual).clone(),
        "visual_objects": (torch.arange(visual) - first * images).expand(rows, visual).clone(),
        "visual_mask": torch.ones(rows, visual, dtype=torch.int64),
    }
