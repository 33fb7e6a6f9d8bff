"""Whether the losses of a step are numbers, without waiting for the device in any of its micro-batches."""

from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dora_dist.runtime.distributed import World
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import write_json

FIRST_TOKENS = 8
"""How many token ids of each sample are recorded, for people to find it by."""


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
        """The loss and the samples of the first micro-batch whose loss is not finite; waits for the device."""
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


def refuse_loss(losses: StepLosses, step: int, world: World, run_dir: Path) -> NoReturn:
    """Raise UserError on every rank, because a loss of this step is infinite or not a number on some (collective)."""
    suspects: list[Any] = [None] * world.world_size
    dist.all_gather_object(suspects, losses.first_not_finite())
    rank, suspect = next((rank, found) for rank, found in enumerate(suspects) if found is not None)
    what = f"optimizer step {step} on rank {rank}: the loss became {suspect['loss']}"
    _refuse(what, {"step": step, "rank": rank, **suspect}, world, run_dir)


def refuse_gradient(losses: StepLosses, step: int, world: World, run_dir: Path) -> NoReturn:
    """Raise UserError on every rank, because the engine skipped this step (collective).

    That is what DeepSpeed does, in every number format, where a gradient is infinite or not a number although the
    loss is finite; the run would count a step in which nothing was learnt.
    """
    samples: list[Any] = [None] * world.world_size
    dist.all_gather_object(samples, losses.samples())
    what = f"optimizer step {step}: the loss is finite, but its gradient is not, so no step could be taken"
    _refuse(what, {"step": step, "first_tokens_by_rank": samples}, world, run_dir)


def _refuse(what: str, facts: dict[str, Any], world: World, run_dir: Path) -> NoReturn:
    if world.first:
        write_json(run_dir / "not_finite.json", facts)
    raise UserError(
        f"{what}; no checkpoint was written for this step. Lower training.learning_rate, lengthen "
        f"training.warmup_steps, or look at the batch recorded in {run_dir / 'not_finite.json'}"
    )
