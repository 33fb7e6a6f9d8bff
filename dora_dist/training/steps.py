"""What happens around each optimizer step on every rank, whatever is trained: its randomness and its deadline."""

from typing import Any

import torch
from transformers import TrainerCallback

from dora_dist.config import EngineConfig
from dora_dist.runtime.distributed import limit_collectives
from dora_dist.runtime.watch import Watch


class Randomness(TrainerCallback):
    """Makes dropout's randomness a function of (seed, step, rank): a resumed run draws what an uninterrupted one
    would.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._seed, self._rank = seed, rank

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(hash((self._seed, state.global_step, self._rank)) % 2**63)


class Deadlines(TrainerCallback):
    """How long the other ranks may take: much longer before and after the steps than from step to step."""

    def __init__(self, watch: Watch, engine: EngineConfig) -> None:
        self._watch = watch
        self._start_timeout_s, self._step_timeout_s = engine.start_timeout_s, engine.step_timeout_s
        self._waiting_for_the_first = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        limit_collectives(self._start_timeout_s)  # DeepSpeed has made its groups by now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._waiting_for_the_first:
            limit_collectives(self._step_timeout_s)
            self._watch.expect_steps(self._step_timeout_s)
        self._waiting_for_the_first = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        limit_collectives(self._start_timeout_s)  # what follows is the last save, or another start
        self._watch.expect_no_steps()
