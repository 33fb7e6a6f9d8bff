"""LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685).

ΔW = s·B·Aᵀ with s = lora_alpha / r, or lora_alpha / √r (rsLoRA: Kalajdzievski, arXiv 2312.03732). A is stored (in, r),
so that a flat shard of it holds whole rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from dora_dist.adapters.method import Initial, Layer, Shape, Tensors, register
from dora_dist.adapters.methods.factored import Factored
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.config.adapter import AdapterConfig


@register
@dataclass(frozen=True)
class LowRank(Factored):
    """The low-rank update; its parameters `lora_A` (in, r) and `lora_B` (out, r) are the factors themselves.

    `lora_alpha` is s·r, however s was given; `use_rslora` tells PEFT's folders how, and changes no function.
    """

    name = "lora"
    titles = ("LoRA", "DoRA")
    r: int = 16
    lora_alpha: float = 32.0
    use_rslora: bool = field(default=False, compare=False, kw_only=True)

    @classmethod
    def from_config(cls, adapter: AdapterConfig) -> Self:
        method = super().from_config(adapter)
        if not adapter.use_rslora:
            return method
        return replace(method, lora_alpha=adapter.lora_alpha * math.sqrt(method.r), use_rslora=True)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r

    def parameters(self, shape: Shape) -> dict[str, Initial]:
        """A has kaiming_uniform(a=√5), B is 0."""
        out_features, in_features = shape
        A = Initial((in_features, self.r), bound=1 / math.sqrt(in_features))
        return {"lora_A": A, "lora_B": Initial((out_features, self.r))}

    def largest_useful_r(self, shape: Shape) -> int:
        return min(shape)

    def factors(self, shape: Shape, parameters: Tensors) -> tuple[Tensor, Tensor]:
        return parameters["lora_A"], parameters["lora_B"]

    def through_factors(self, layer: Layer, grad_A: Tensor, grad_B: Tensor) -> dict[str, Tensor]:
        return {"lora_A": grad_A, "lora_B": grad_B}

    def add_to_gradients(
        self, layer: Layer, unscaled_A: Tensor, grad_B: Tensor, *, gradients: dict[str, Tensor]
    ) -> None:
        gradients["lora_B"].add_(grad_B.to(gradients["lora_B"].dtype))
        gradients["lora_A"].add_(unscaled_A, alpha=self.scaling)

    def from_peft(self, theirs: AdapterLayer, base_norm: Tensor | None) -> dict[str, Tensor]:
        assert theirs.lora_A is not None and theirs.lora_B is not None
        return {"lora_A": theirs.lora_A.t(), "lora_B": theirs.lora_B}

    def differences(self, theirs: AdapterLayer) -> Iterator[str]:
        if type(theirs) is not AdapterLayer:
            yield f'it is {theirs.title} (set adapter.method to "{theirs.method}")'
            return
        if theirs.r is None:
            yield "it trains magnitudes alone there (name it in adapter.magnitude_only_modules)"
            return
        if theirs.r != self.r:
            yield f"its r is {theirs.r}, adapter.r = {self.r} (set it to {theirs.r})"
        if not math.isclose(theirs.scaling, self.scaling):
            over, divisor = ("sqrt(adapter.r)", math.sqrt(theirs.r)) if self.use_rslora else ("adapter.r", theirs.r)
            yield (
                f"its scaling is {theirs.scaling:g}, adapter.lora_alpha / {over} = {self.scaling:g} (set "
                f"adapter.lora_alpha to {theirs.scaling * divisor:g})"
            )
