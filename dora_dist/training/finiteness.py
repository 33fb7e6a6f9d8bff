"""Whether the losses of a step are numbers, without waiting for the device in any of its micro-batches."""

from typing import Any

import torch
from torch import Tensor

FIRST_TOKENS = 8
"""Of each sample, for people to find it by."""


class StepLosses:
    """The micro-batches of one optimizer step on this rank: their losses stay on the device until one is asked for."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._first_tokens: list[Tensor] = []

    def add(self, loss: Tensor, input_ids: Tensor) -> None:
        """A micro-batch's loss, 0-d on the device, and its token ids (rows, length), wherever they are."""
        self._losses.append(loss.detach())
        self._first_tokens.append(input_ids[:, :FIRST_TOKENS])

    def not_finite(self, device: torch.device) -> Tensor:
        """1 where a loss is infinite or not a number, else 0; 0-d fp32, and nothing waits for it."""
        if not self._losses:
            return torch.zeros((), device=device)
        return torch.stack(self._losses).isfinite().logical_not().any().float()

    def first_not_finite(self) -> dict[str, Any] | None:
        """The loss and the samples of the first micro-batch whose loss is none; waits for the device."""
        for loss, tokens in zip(self._losses, self._first_tokens, strict=True):
            if not loss.isfinite():
                return {"loss": float(loss), "first_tokens": tokens.tolist()}
        return None

    def samples(self) -> list[list[int]]:
        """The first tokens of every sample of the step."""
        return [row for tokens in self._first_tokens for row in tokens.tolist()]

    def clear(self) -> None:
        """Begin the next step."""
        self._losses.clear()
        self._first_tokens.clear()
