"""What happens around each optimizer step, whatever is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from dora_dist.config import RunConfig
from dora_dist.runtime.distributed import World, limit_collectives
from dora_dist.runtime.stopping import StopRequest
from dora_dist.runtime.watch import Watch

if TYPE_CHECKING:
    from dora_dist.training.trainer import DoraTrainer


class StepCallback(TrainerCallback):
    """What has to happen around each optimizer step, on every rank."""

    def __init__(self, world: World, watch: Watch, stop: StopRequest, config: RunConfig) -> None:
        self.trainer: DoraTrainer | None = None
        self._world, self._watch, self._stop, self._seed = world, watch, stop, config.training.seed
        self._start_timeout_s, self._step_timeout_s = config.engine.start_timeout_s, config.engine.step_timeout_s
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self._watch.before_exit = self.trainer.wait_for_saving
        self._stop.can_save = True
        limit_collectives(self._start_timeout_s)  # DeepSpeed has made its groups by now

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Dropout's randomness as a function of position: a resumed run draws what an uninterrupted one would.
        torch.manual_seed(hash((self._seed, state.global_step, self._world.rank)) % 2**63)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.agree()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.check_step_was_taken()
        self.trainer.settle_components()
        if self.trainer.compacting:  # `run.train` goes on from the checkpoint that this writes
            control.should_save = control.should_training_stop = True
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be little time left
        self._steps += 1
        if self._steps == 1:
            limit_collectives(self._step_timeout_s)
            self._watch.expect_steps(self._step_timeout_s)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        limit_collectives(self._start_timeout_s)  # what follows is the last save, or another start
        self._watch.expect_no_steps()
