"""Learning rates: those of single modules and kinds of parameters, and the schedule of a run that is resumed."""

import json
import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from dora_dist.adapters.layer import parameter_kinds
from dora_dist.adapters.patterns import matches
from dora_dist.config import TrainingConfig
from dora_dist.models.families import family_of_model
from dora_dist.runtime.errors import UserError

_RATE_OF = "rate_of"
"""Where a parameter group has the pattern whose rate it has."""


def rated(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    """The trained parameters of a kind that adapters have, else those that a pattern or its modules name.

    Raises UserError for none.
    """
    kinds = parameter_kinds(model)
    if pattern in kinds:
        return kinds[pattern]
    field, apart = "training.learning_rates", family_of_model(model).apart
    modules = [module for name, module in model.named_modules() if name and matches(pattern, name, field, apart=apart)]
    named = [p for module in modules for p in module.parameters()]
    every = model.named_parameters(remove_duplicate=False)
    named += [p for name, p in every if matches(pattern, name, field, apart=apart)]
    if not named:
        outer = ", ".join(dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters()))
        ours = f"; kinds of adapter parameters: {', '.join(kinds)}" if kinds else ""
        raise UserError(f"{field}: {pattern!r} matches no module with parameters; the outermost are: {outer}{ours}")
    if not (found := [p for p in named if p.requires_grad]):
        raise UserError(f"{field}: nothing in {pattern!r} is trained; leave it out, or train it")
    return found


def set_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Move the trained parameters that a kind or a pattern names (`rated`) into groups with its peak rate.

    To be called before a schedule is made: it takes each group's rate for its peak. Of two patterns that name one
    parameter, the later one holds. Raises UserError for a pattern that names nothing that is trained.
    """
    for pattern, rate in rates.items():
        chosen = {id(p) for p in rated(model, pattern)}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in chosen]
            if moved and len(moved) < len(group["params"]):
                group["params"] = [p for p in group["params"] if id(p) not in chosen]
                optimizer.add_param_group({**group, "params": moved, "lr": rate, _RATE_OF: pattern})
            elif moved:  # the whole group, which must not stay behind empty
                group["lr"], group[_RATE_OF] = rate, pattern


def rates_by_pattern(schedule: LambdaLR) -> dict[str, float]:
    """The present rate of each group; "" for what no pattern of training.learning_rates names."""
    groups = schedule.optimizer.param_groups
    return {str(group.get(_RATE_OF, "")): float(group["lr"]) for group in groups}


def library_name(schedule: str) -> str:
    """What transformers calls training.schedule."""
    return "constant_with_warmup" if schedule == "constant" else schedule


def shares(training: TrainingConfig, steps: int) -> list[float]:
    """The learning rate of each of a run's optimizer steps, over its peak: `steps` numbers.

    Raises UserError where the schedule cannot be made of its settings, or has a rate that no step can take.
    """
    warmup = training.warmup_steps
    if warmup is None:
        warmup = math.ceil((training.warmup_ratio or 0) * steps)  # as the Trainer rounds it
    given = f"training.schedule_settings = {json.dumps(training.schedule_settings)}"
    remedy = f'; correct it for training.schedule = "{training.schedule}" over {steps:,} steps'
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    name, settings = library_name(training.schedule), training.schedule_settings
    try:
        schedule = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=settings)
        found = [float(schedule.lr_lambdas[0](step)) for step in range(steps)]
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"{given}: {error}{remedy}") from error
    wrong = next((step for step, share in enumerate(found) if not 0 <= share < math.inf), None)
    if wrong is not None:
        raise UserError(f"{given}: gives step {wrong + 1:,} {found[wrong]:g} times the peak rate{remedy}")
    return found


def go_on_at(schedule: LambdaLR, step: int) -> list[float]:
    """Put a schedule where it is after `step` optimizer steps; returns the rate of each group for the next step.

    It follows from the schedule alone, not from what it was when a checkpoint was written: another peak, shape or
    length of the run takes effect at once. Unchanged settings give the very same rates.
    """
    rates = [float(peak * share(step)) for peak, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # the schedule writes one only when it steps
    return rates
