"""What models of transformers do with the output of their last layer before it is a prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Logits = Callable[[Any, Tensor], Tensor]
"""(model, (tokens, vocabulary)) -> (tokens, vocabulary)."""


def unchanged(model: Any, logits: Tensor) -> Tensor:
    return logits


def soft_capped(model: Any, logits: Tensor) -> Tensor:
    """Gemma 2."""
    most: float | None = model.config.get_text_config().final_logit_softcapping
    return logits if most is None else torch.tanh(logits / most) * most


def scaled(model: Any, logits: Tensor) -> Tensor:
    """Granite."""
    return logits / model.config.get_text_config().logits_scaling


def shifted(model: Any, logits: Tensor) -> Tensor:
    """BART."""
    return logits + model.final_logits_bias
