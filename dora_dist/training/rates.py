"""Learning rates of single modules, beside the run's own."""

from collections.abc import Mapping

import torch
from torch import nn

from dora_dist.adapters.inject import trained_in_full
from dora_dist.errors import UserError


def rated(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    """The trained parameters in the modules that a pattern names. Raises UserError where there are none."""
    modules = [model.get_submodule(name) for name in trained_in_full(model, [pattern], "training.learning_rates")]
    found = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not found:
        raise UserError(f"training.learning_rates: nothing in {pattern!r} is trained; leave it out, or train it")
    return found


def set_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Move the trained parameters of the modules that a pattern names into groups with its peak rate.

    To be called before a schedule is made: it takes each group's rate for its peak. Of two patterns that name one
    parameter, the later one holds. Raises UserError for a pattern that names nothing that is trained.
    """
    for pattern, rate in rates.items():
        chosen = {id(p) for p in rated(model, pattern)}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in chosen]
            if moved and len(moved) < len(group["params"]):
                group["params"] = [p for p in group["params"] if id(p) not in chosen]
                optimizer.add_param_group({**group, "params": moved, "lr": rate})
            elif moved:  # the whole group, which must not stay behind empty
                group["lr"] = rate
