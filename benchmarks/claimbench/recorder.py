"""What each kind of trained parameter does in the first steps of a run: `recorder.py FILE STEPS RECIPE OPTION...`.

The run is a real one, in one process; it is asked to stop after STEPS steps, as by a scheduler.
"""

import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dora_dist import RunConfig, train
from dora_dist.adapters.layer import parameter_kinds
from dora_dist.runtime.errors import Stopped
from dora_dist.zero3.optimizer_state import held_state
from dora_dist.zero3.state_names import MASTER, MOMENTS

OTHERS = "weights"
"""The kind of what is trained as it is: everything in full fine-tuning."""


class Moves(NamedTuple):
    """Of all parameters of a kind, after a step: how many numbers they are, and root mean squares of the numbers, of
    their gradients as the optimizer got them (averaged and clipped), and of what the step added to them.
    """

    numbers: int
    size: float
    gradient: float
    update: float

    @classmethod
    def of(cls, before: Iterable[Tensor], after: Iterable[Tensor], gradients: Iterable[Tensor]) -> "Moves":
        sums = torch.zeros(3, dtype=torch.float64)
        numbers = 0
        for old, new, gradient in zip(before, after, gradients, strict=True):
            numbers += new.numel()
            sums += torch.stack([part.double().square().sum() for part in (new, gradient, new - old)]).cpu()
        return cls(numbers, *(sums / max(numbers, 1)).sqrt().tolist())


class StepRecorder(TrainerCallback):
    """Writes a line for each of the first steps into a file, then asks the run to stop. For one process.

    A gradient is read off Adam's first moment m, which is β·m + (1 − β)·gradient after a step: it is what the optimizer
    got, whatever the engine did to it before.
    """

    def __init__(self, file: Path, steps: int) -> None:
        self._file, self._steps = file, steps
        self._kinds: Mapping[str, list[nn.Parameter]] = {}
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Again where a smaller model goes on: its parameters are others."""
        model: nn.Module = kwargs["model"]
        kinds = parameter_kinds(model)
        adapters = {id(p) for parameters in kinds.values() for p in parameters}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in adapters]
        self._kinds = {**kinds, **({OTHERS: others} if others else {})}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = {
            id(p): (_master(p).clone(), None if (m := held_state(p, MOMENTS[0])) is None else m.clone())
            for parameters in self._kinds.values()
            for p in parameters
        }

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the step, and before components are pruned."""
        line = {
            "step": state.global_step + 1,
            "kinds": {kind: self._moves(own, args.adam_beta1)._asdict() for kind, own in self._kinds.items()},
        }
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._steps:
            os.kill(os.getpid(), signal.SIGUSR1)

    def _moves(self, parameters: list[nn.Parameter], beta: float) -> Moves:
        olds, moments = zip(*(self._before[id(p)] for p in parameters), strict=True)
        gradients = (_gradient(p, moment, beta) for p, moment in zip(parameters, moments, strict=True))
        return Moves.of(olds, map(_master, parameters), gradients)


def _master(parameter: nn.Parameter) -> Tensor:
    held = held_state(parameter, MASTER)
    assert held is not None
    return held


def _gradient(parameter: nn.Parameter, before: Tensor | None, beta: float) -> Tensor:
    now = held_state(parameter, MOMENTS[0])
    assert now is not None
    return (now if before is None else now - beta * before) / (1 - beta)


def main(file: Path, steps: int, recipe: str, options: list[str]) -> None:
    config = RunConfig.load(recipe, options, check_files=True)
    try:
        train(config, callbacks=[StepRecorder(file, steps)])
    except Stopped as stopped:
        print(stopped)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
