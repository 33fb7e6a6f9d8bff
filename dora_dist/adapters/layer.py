"""One adapted linear layer: a frozen weight, a method's parameters, and one autograd function over both.

The layer knows no method: `method.py` says what it asks of one, `methods/` has them.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dora_dist.adapters.held import HeldLinear, bias_gradient
from dora_dist.adapters.method import AdapterMethod, Needs
from dora_dist.adapters.storage import PLAIN, WeightStorage


class AdaptedLinear(HeldLinear):
    """A linear layer (out, in) whose parameters are all direct members: one coalesced gather under ZeRO-3.

    Parameters: what holds the frozen (out, in) weight (`held`; in plain storage that is `weight` itself) and `bias`
    (out,), frozen too unless it is told to require a gradient, in the base's dtype; the trainable ones of the method,
    in the same dtype. `base_norm` and
    `norm` (out,), fp32, are the row norms of W0 and of W0 + ΔW; where the method needs them, a norms refresher sets
    them before the first forward.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        method: AdapterMethod,
        storage: WeightStorage = PLAIN,
    ) -> None:
        super().__init__(weight, bias, storage)
        self.method = method
        self.base_norm: Tensor | None = None
        self.norm: Tensor | None = None
        self.is_on = True  # off: the layer computes what the base's does (`switch.py`)
        self.dem_weight = 0.0  # of the penalty on components, per component and backward pass (`components.py`)
        # An output that is small relative to its FLOPs is worth it.
        self.keeps_products = self.in_features >= 2 * self.out_features
        self._adapter_names = tuple(method.parameters(self.shape))
        for name, initial in method.parameters(self.shape).items():
            values = torch.empty(initial.shape, dtype=weight.dtype, device=weight.device)
            self.register_parameter(name, nn.Parameter(values))

    @classmethod
    def from_linear(cls, linear: nn.Linear, method: AdapterMethod, storage: WeightStorage = PLAIN) -> "AdaptedLinear":
        """A layer over a plain one's own parameters, initialised as the method says: y equals the base's output.

        On the meta device they stay without values: whoever gives them memory fills them (`inject.initial_fills`).
        """
        layer = cls(cast(nn.Parameter, linear.weight), cast("nn.Parameter | None", linear.bias), method, storage)
        own = layer.adapter_parameters()
        with torch.no_grad():
            for name, (_, bound, value) in method.parameters(layer.shape).items():
                own[name].uniform_(-bound, bound) if bound else own[name].fill_(value)
        return layer

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The method's parameters by name: trained, and not read from the base."""
        own = cast(dict[str, nn.Parameter], self._parameters)  # not getattr: several times per layer and pass
        return {name: own[name] for name in self._adapter_names}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out), in x's dtype. Raises RuntimeError before norms were ever computed."""
        if not self.is_on:
            return self._base_output(x)
        drops = self.method.dropout > 0.0 and self.training
        dropped = F.dropout(x, self.method.dropout) if drops else None
        return cast(Tensor, _AdaptedProduct.apply(x, dropped, self, self.bias, *self.adapter_parameters().values()))

    def _base_output(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # also a segment that backward computes again, which was computed with adapters
            raise RuntimeError("adapters are off, and then nothing is trained; call backward outside of adapters_off()")
        return self.base_product(x.reshape(-1, x.shape[-1]), self.bias).view(*x.shape[:-1], -1)

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptedLinear":
        # Norms follow the module between devices, but never to another dtype: a bf16 norm changes step 0.
        super()._apply(fn, recurse)
        if self.norm is not None and self.base_norm is not None:
            device = fn(torch.empty(0)).device
            self.norm, self.base_norm = self.norm.to(device), self.base_norm.to(device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.method}"


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Every AdaptedLinear of a model by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def parameter_kinds(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The adapters' parameters of a model by kind, which is the name that a layer's method has for one."""
    kinds: dict[str, list[nn.Parameter]] = {}
    for layer in adapted_layers(model).values():
        for kind, parameter in layer.adapter_parameters().items():
            kinds.setdefault(kind, []).append(parameter)
    return kinds


def before_any_forward(model: nn.Module, act: Callable[[], None], prepend: bool = False) -> list[RemovableHandle]:
    """Have `act()` run before the forward of every AdaptedLinear of `model` and of every module around one.

    Whichever of them is called first after an optimizer step, the root or an inner module, acts before anything that
    depends on it runs, and before an engine that is attached later gathers the module's weights.
    """
    adapted = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    around = {name.rsplit(".", depth)[0] for name in adapted for depth in range(name.count(".") + 1)} | {""}
    hooked = [module for name, module in model.named_modules() if name in around]
    return [module.register_forward_pre_hook(lambda *_: act(), prepend=prepend) for module in hooked]


class _AdaptedProduct(torch.autograd.Function):
    """A layer's output and its gradients, on full or on gathered weights alike.

    The context keeps the layer, and so Parameter OBJECTS, not their data: ZeRO-3 frees the data after forward and
    gathers it again before backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, layer: AdaptedLinear, bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        ctx.layer, ctx.x_shape, ctx.had_dropped = layer, x.shape, dropped is not None
        dropped_ti = None if dropped is None else dropped.reshape(-1, x.shape[-1])
        y_to, saved = layer.method.forward(layer, x.reshape(-1, x.shape[-1]), dropped_ti)
        ctx.save_for_backward(*saved)
        return y_to.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: AdaptedLinear = ctx.layer
        needs = Needs(ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.had_dropped)
        grad_to = grads[0].reshape(-1, layer.out_features)
        found = layer.method.backward(layer, ctx.saved_tensors, grad_to, needs=needs)
        x, dropped = (None if g is None else g.view(ctx.x_shape) for g in (found.x, found.dropped))
        bias = bias_gradient(grad_to) if ctx.needs_input_grad[3] else None  # no g in it
        own = layer.adapter_parameters()
        return x, dropped, None, bias, *(found.parameters[name].to(p.dtype) for name, p in own.items())
