"""Full fine-tuning: no adapter; the model's own parameters are trained, all of them or those of chosen modules.

The first row of every table of the DoRA paper (Liu et al., arXiv 2402.09353, section 5). A weight that modules share is
trained in all of them and stays shared.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from dora_dist.adapters.method import Method, register
from dora_dist.adapters.patterns import parts_in, trained_in_full
from dora_dist.config.adapter import AdapterConfig
from dora_dist.runtime.errors import UserError

# weight_decomposed is true unless a configuration says otherwise, and says nothing here.
_READ = ("method", "weight_decomposed", "dynamic_rank", "target_modules", "trained_modules", "trained_parameters")


@register
@dataclass(frozen=True)
class FullFineTuning(Method):
    """Trains the modules that adapter.target_modules names, or the whole model where that is null."""

    name: ClassVar[str] = "full"

    @classmethod
    def from_config(cls, adapter: AdapterConfig) -> "FullFineTuning":
        """Raises UserError for fields of adapters that are set to something else than their defaults."""
        for name, field in AdapterConfig.model_fields.items():
            value = getattr(adapter, name)
            if name not in _READ and value != field.default:
                raise UserError(
                    f'adapter.{name} = {json.dumps(value)}: has no meaning for adapter.method = "{cls.name}", which '
                    "trains no adapter; take it out, or choose another method"
                )
        if adapter.target_modules is None and adapter.trained_modules is not None:
            raise UserError(
                f"adapter.trained_modules = {json.dumps(adapter.trained_modules)}: adapter.method = "
                f'"{cls.name}" trains the whole model where adapter.target_modules is null; take it out, or name in '
                "adapter.target_modules what is to be trained"
            )
        return cls()

    @property
    def title(self) -> str:
        return "full fine-tuning"

    def settings(self) -> dict[str, Any]:
        return {"method": self.name, "weight_decomposed": False, "gated": False}

    def trained(self, model: nn.Module, target_modules: Sequence[str] | None, *, apart: Sequence[str]) -> list[str]:
        """All parameters but those of parts that are `apart`, which are trained if `target_modules` names them."""
        names = [name for name, _ in model.named_parameters()]
        if target_modules is None:
            return [name for name in names if not parts_in(name, apart)]
        modules = trained_in_full(model, target_modules, "adapter.target_modules", apart=apart)
        chosen = {id(p) for module in modules for p in model.get_submodule(module).parameters()}
        return [name for name, p in model.named_parameters() if id(p) in chosen]
