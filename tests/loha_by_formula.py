"""The method of examples/add_a_method.py as its formula reads: whole matrices, differentiated by autograd."""

from dataclasses import dataclass

import torch
from add_a_method import LoHa
from torch import Tensor

from dora_dist.adapters.method import Gradients, Initial, Layer, Needs, Saved, Shape, Tensors, register


def adapted(weight: Tensor, method: LoHa, own: Tensors) -> Tensor:
    """W0 + s·(B1·A1ᵀ)⊙(B2·A2ᵀ) (out, in); where there is a magnitude_offset δ, its rows scaled to (‖W0‖ + δ)."""
    scaling = method.lora_alpha / method.r
    whole = weight + scaling * (own["loha_B1"] @ own["loha_A1"].T) * (own["loha_B2"] @ own["loha_A2"].T)
    if "magnitude_offset" not in own:
        return whole
    return ((weight.norm(dim=1) + own["magnitude_offset"]) / whole.norm(dim=1).detach())[:, None] * whole


@register
@dataclass(frozen=True)
class LoHaByFormula(LoHa):
    """For one process, as the weight is built whole; with `decomposed` it has a magnitude of its own."""

    name = "loha_by_formula"
    decomposed: bool = False

    def parameters(self, shape: Shape) -> dict[str, Initial]:
        magnitude = {"magnitude_offset": Initial((shape[0],))} if self.decomposed else {}
        return super().parameters(shape) | magnitude

    def forward(self, layer: Layer, x_ti: Tensor, dropped_ti: Tensor | None) -> tuple[Tensor, Saved]:
        return x_ti @ adapted(weight_of(layer, x_ti), self, layer.adapter_parameters()).T, (x_ti,)

    def backward(self, layer: Layer, saved: Saved, grad_to: Tensor, *, needs: Needs) -> Gradients:
        assert saved[0] is not None
        with torch.enable_grad():
            own = {name: p.detach().requires_grad_() for name, p in layer.adapter_parameters().items()}
            x_ti = saved[0].detach().requires_grad_()
            y_to = x_ti @ adapted(weight_of(layer, x_ti), self, own).T
        grad_x, *grads = torch.autograd.grad(y_to, [x_ti, *own.values()], grad_to)
        return Gradients(grad_x, None, dict(zip(own, grads, strict=True)))


def weight_of(layer: Layer, like: Tensor) -> Tensor:
    return layer.base_product_back(torch.eye(layer.shape[0]).to(like))
