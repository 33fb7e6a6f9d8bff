"""What is trained of a model's own parameters besides adapters, in the words in which PEFT can say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dora_dist.adapters.patterns import inside, names_of_each, outside


@dataclass(frozen=True)
class TrainedParameters:
    """`names` of single parameters that are trained as they are.

    `modules` are made up of such parameters alone, and share none with others: PEFT knows them as modules_to_save.
    `all_biases` says that every bias of the model is trained, which is PEFT's `bias: "all"`.
    """

    names: Sequence[str] = ()
    modules: Sequence[str] = ()
    all_biases: bool = False

    @classmethod
    def of(cls, model: nn.Module, parameters: Sequence[str], trained_modules: Sequence[str]) -> TrainedParameters:
        """For a `model` that has no adapters yet, of which `trained_modules` (names) are trained, too."""
        single = outside(parameters, trained_modules)
        every = names_of_each(model)
        whole = set(single) - {name for names in every if len(names) > 1 for name in names}
        modules = [
            name
            for name, module in model.named_modules()
            if (own := {f"{name}.{inner}" for inner, _ in module.named_parameters()}) and own <= whole
        ]
        # The innermost alone; and PEFT takes every module whose name ends in a listed one.
        others = [name for name, _ in model.named_modules()]
        modules = [m for m in modules if not any(n != m and (inside(n, m) or n.endswith(m)) for n in others)]
        biases = {name for names in every for name in names if name.rpartition(".")[2] == "bias"}
        untrained = outside(biases.difference(single), trained_modules)
        return cls(single, modules, bool(biases) and not untrained)
