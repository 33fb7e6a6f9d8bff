"""A linear layer whose frozen weight a storage holds: what an adapted layer is made on, and all that a layer without an
adapter is.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from dora_dist.adapters.recompute import has_kept_products, kept_products
from dora_dist.adapters.storage import PLAIN, WeightStorage


class HeldLinear(nn.Module):
    """y = x·W0ᵀ + bias, with parameters that are all direct members: one coalesced gather under ZeRO-3.

    What holds the frozen (out, in) weight is `held`; in plain storage that is `weight` itself. The `bias` (out,) is
    frozen too, unless it is told to require a gradient. `keeps_products`: a recomputation takes the products of the
    forward that it repeats (`recompute.py`).
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        storage: WeightStorage,
        shape: tuple[int, int] | None = None,
    ) -> None:
        """shape: (out, in) where `weight` has it no longer, as it is a shard."""
        super().__init__()
        self.out_features, self.in_features = weight.shape if shape is None else shape
        self.storage = storage
        self.keeps_products = False
        for name, held in storage.hold(weight).items():
            self.register_parameter(name, held)
        self.bias = bias
        if bias is not None:
            bias.requires_grad_(False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), whatever holds the weight, and whatever part of it is here."""
        return self.out_features, self.in_features

    def held(self) -> list[nn.Parameter]:
        """The frozen parameters that hold the weight, in the order of the storage's `tensors`."""
        return [self.get_parameter(name) for name in self.storage.tensors]

    def base_product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, in) -> x·W0ᵀ + bias (tokens, out), in x's dtype."""
        return self.storage.project(x, self.held(), self.shape, bias=bias)

    def base_product_back(self, grad: Tensor) -> Tensor:
        """grad (tokens, out) -> grad·W0 (tokens, in), in grad's dtype."""
        return self.storage.project_back(grad, self.held(), self.shape)

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of W0, fp32 (rows, in), while the weight is whole; a view of it where it is held so."""
        flat = [held.data.reshape(-1) for held in self.held()]
        span = (start * self.in_features, stop * self.in_features)
        return self.storage.to_fp32(flat, *span, device=flat[0].device).view(-1, self.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        """`forward`, with the hooks of a module; without them where it needs no parameter, as an engine's gather them.

        A recomputation's graph is thrown away (checkpoint takes its saved tensors only), and so are hooks on it.
        """
        y: Tensor = self.forward(x) if has_kept_products(self) else super().__call__(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out), in x's dtype."""
        return cast(Tensor, _HeldProduct.apply(x, self, self.bias))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.storage.name}"


def held_linear(linear: nn.Linear, storage: WeightStorage) -> HeldLinear:
    """A layer over a plain one's own bias, and its weight as `storage` holds it; a shard where that is plain."""
    weight, bias = cast(nn.Parameter, linear.weight), cast("nn.Parameter | None", linear.bias)
    return HeldLinear(weight, bias, storage, (linear.out_features, linear.in_features))


def held_layers(model: nn.Module) -> dict[str, HeldLinear]:
    """Every HeldLinear of a model by name, adapted or not, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HeldLinear)}


def packed_modules(model: nn.Module) -> list[str] | None:
    """The modules of a model whose weight a packed storage holds, by name; None where there is none."""
    return [name for name, layer in held_layers(model).items() if layer.storage is not PLAIN] or None


def bias_gradient(grad_to: Tensor) -> Tensor:
    """That of a bias, given the output's (tokens, out): summed in fp32, in the same dtype."""
    return grad_to.sum(0, dtype=torch.float32).to(grad_to.dtype)


class _HeldProduct(torch.autograd.Function):
    """The context keeps the layer, not the parameters' data: ZeRO-3 frees it, and gathers it again for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: HeldLinear, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.x_shape = layer, x.shape
        [y_to] = kept_products(layer, lambda: (layer.base_product(x.reshape(-1, x.shape[-1]), bias),))
        assert y_to is not None
        return y_to.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_to = grads[0].reshape(-1, ctx.layer.out_features)
        x = ctx.layer.base_product_back(grad_to).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        return x, None, bias_gradient(grad_to) if ctx.needs_input_grad[2] else None
