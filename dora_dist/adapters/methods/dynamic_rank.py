"""Dynamic rank: LoRA whose single-rank components have gates, so that the least important ones can be pruned.

Mao et al., "DoRA: Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank Distribution", ACL 2024
(arXiv 2405.17357). ΔW = s·B·diag(c)·Aᵀ; component i is c_i·B_i·A_i. `components.py` scores and prunes them.

The paper starts with c = 0 between two random factors, and divides alpha by the components that there are then. Here
both are LoRA's unless they are asked for: B = 0 and c = 1, and alpha over the components that are left on average.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor

from dora_dist.adapters.method import Components, Initial, Layer, Shape, Tensors, register
from dora_dist.adapters.methods.lora import LowRank
from dora_dist.adapters.methods.sums import column_dot
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.config.adapter import AdapterConfig

ComponentInit = Literal["lora", "paper"]


@register
@dataclass(frozen=True)
class DynamicRank(LowRank):
    """The gated low-rank update: LoRA's factors and `lora_gates` c (r,); `r` is the rank that training starts from.

    `component_init` "lora": the gates are 1, the factors start as LoRA's do, B at 0, so that whole matrices learn from
    the first step on; "paper": the gates are 0, both factors have kaiming_uniform(a=0) (Mao, section 3.1).
    """

    name = "dynamic_rank"
    titles = ("LoRA with dynamic rank", "DoRA with dynamic rank")
    of_training = LowRank.of_training | {"component_init"}
    component_init: ComponentInit = "lora"

    @classmethod
    def from_config(cls, adapter: AdapterConfig) -> Self:
        """adapter.component_scale "budget": lora_alpha is over adapter.r, or its root, not of the r at the start."""
        method = super().from_config(adapter)
        if adapter.component_scale == "paper" or adapter.r is None:
            return method
        divisor = math.sqrt(adapter.r) if adapter.use_rslora else adapter.r
        return replace(method, lora_alpha=adapter.lora_alpha * method.r / divisor)

    @property
    def components(self) -> Components:
        return Components("lora_A", "lora_B", "lora_gates")

    def parameters(self, shape: Shape) -> dict[str, Initial]:
        if self.component_init == "lora":
            return super().parameters(shape) | {"lora_gates": Initial((self.r,), value=1.0)}
        out_features, in_features = shape
        A = Initial((in_features, self.r), bound=math.sqrt(6 / in_features))
        B = Initial((out_features, self.r), bound=math.sqrt(6 / self.r))
        return {"lora_A": A, "lora_B": B, "lora_gates": Initial((self.r,))}

    def factors(self, shape: Shape, parameters: Tensors) -> tuple[Tensor, Tensor]:
        return parameters["lora_A"], parameters["lora_B"] * parameters["lora_gates"]

    # In products the gates go with the hidden activations (tokens, r), of which A alone makes the part that is saved.

    def down(self, layer: Layer, x_ti: Tensor) -> Tensor:
        return x_ti @ layer.adapter_parameters()["lora_A"]

    def add_up(self, layer: Layer, hidden: Tensor, y_to: Tensor) -> None:
        own = layer.adapter_parameters()
        y_to.addmm_(hidden * own["lora_gates"], own["lora_B"].t(), alpha=self.scaling)

    def gradients(
        self, layer: Layer, x_ti: Tensor, hidden: Tensor | None, *, grad_to: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        assert hidden is not None
        own = layer.adapter_parameters()
        grad_gated = (grad_to @ own["lora_B"]).mul_(self.scaling)
        grad_hidden = grad_gated * own["lora_gates"]
        found = {
            "lora_A": x_ti.t() @ grad_hidden,
            "lora_B": (grad_to.t() @ (hidden * own["lora_gates"])).mul_(self.scaling),
            "lora_gates": column_dot(grad_gated, hidden),
        }
        return found, grad_hidden

    def add_to_gradients(
        self, layer: Layer, unscaled_A: Tensor, grad_B: Tensor, *, gradients: dict[str, Tensor]
    ) -> None:
        """What comes for B·diag(c) is handed on to B and c."""
        own = layer.adapter_parameters()
        gradients["lora_gates"].add_((grad_B * own["lora_B"]).sum(0))
        super().add_to_gradients(layer, unscaled_A, grad_B * own["lora_gates"], gradients=gradients)

    def add_penalty(self, layer: Layer, gradients: dict[str, Tensor]) -> None:
        """That of Σ_i Var(A_i) + Var(B_i), weighed by the layer's `dem_weight` (Mao, section 3.4)."""
        if not layer.dem_weight:
            return
        own = layer.adapter_parameters()
        for name in ("lora_A", "lora_B"):
            factor = own[name]
            weight = 2 * layer.dem_weight / max(factor.shape[0] - 1, 1)
            gradients[name].add_((factor - factor.mean(0)) * weight)

    def to_peft(self, shape: Shape, values: Tensors, base_norm: Tensor | None) -> AdapterLayer | None:
        """The gates go into B; components whose gate is 0 are left out."""
        kept = values["lora_gates"].nonzero()[:, 0] if values else ()
        if not len(kept):
            return None
        return super().to_peft(shape, {name: v[..., kept] for name, v in values.items()}, base_norm)

    def resized(self, r: int) -> "DynamicRank | None":
        return replace(self, r=r, lora_alpha=self.scaling * r) if r else None
