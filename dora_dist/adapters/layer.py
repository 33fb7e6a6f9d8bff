"""One adapted linear layer: weight-decomposed, dynamic-rank, both, neither (LoRA), or magnitude only.

Two methods are called DoRA: Liu et al., "Weight-Decomposed Low-Rank Adaptation", ICML 2024 (arXiv 2402.09353), and
Mao et al., "Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank Distribution", ACL 2024 (arXiv 2405.17357).
The first has magnitudes m, the second a gate c per single-rank component. With W0 (out, in) frozen, s = lora_alpha / r
and V' = W0 + s·B·diag(c)·Aᵀ (A is stored (in, r), so that a flat shard of it holds whole rows):

    n = row norms of V'        m = ‖W0‖ + δ        g = m / n
    y = x·W0ᵀ + (g − 1)⊙(xd·W0ᵀ) + s·g⊙(((xd·A)⊙c)·Bᵀ) + bias          xd = dropout(x)

Without magnitudes g = 1, without gates c = 1.

n is a function of parameters only: whoever owns the layer refreshes it once per optimizer step (`norms.py`), and
nothing here ever computes it. All arithmetic on m, n and g is fp32; what multiplies activations is g − 1, whose
low-precision rounding is relative to the CHANGE of the magnitude, not to the magnitude.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dora_dist.adapters.recompute import kept_output
from dora_dist.adapters.storage import PLAIN, WeightStorage

NormGradient = Literal["detached", "full"]
DropoutMode = Literal["exact", "adapter"]


@dataclass(frozen=True)
class AdapterSpec:
    """What one layer's adapter is; the same for every layer of a kind.

    `r` is None for magnitude-only modules (Liu, Table 6); with `gated`, it is the rank that training starts from.
    `dropout_mode` "exact" drops the input of everything but
    the undropped base product, as the paper's formula says; "adapter" drops the low-rank branch alone and saves one
    base product. `norm_gradient` "detached" is Liu's section 4.3; "full" lets the gradient flow through n.
    """

    r: int | None
    lora_alpha: float = 1.0
    weight_decomposed: bool = True
    dropout: float = 0.0
    dropout_mode: DropoutMode = "exact"
    norm_gradient: NormGradient = "detached"
    gated: bool = False

    def __post_init__(self) -> None:
        if self.r is None and not self.weight_decomposed:
            raise ValueError("a module with neither low-rank factors (r) nor a magnitude would train nothing")
        if self.r is None and self.gated:
            raise ValueError("gates belong to low-rank components: a module without r has none")

    @property
    def scaling(self) -> float:
        """s = lora_alpha / r, dimensionless; 0 where there are no low-rank factors."""
        return 0.0 if self.r is None else self.lora_alpha / self.r


class AdaptedLinear(nn.Module):
    """A linear layer (out, in) whose parameters are all direct members: one coalesced gather under ZeRO-3.

    Parameters: `weight` (out, in) and `bias` (out,) frozen, in the base's dtype; `lora_A` (in, r), `lora_B` (out, r),
    `lora_gates` c (r,) and `magnitude_offset` δ (out,) trainable, each None where the spec has no use for it.
    `base_norm` and `norm` (out,), fp32, are ‖W0‖ and ‖V'‖ per row; a norms refresher sets them before the first
    forward.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        spec: AdapterSpec,
        storage: WeightStorage = PLAIN,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.spec = spec
        self.storage = storage
        self.base_norm: Tensor | None = None
        self.norm: Tensor | None = None
        self.dem_weight = 0.0  # DEM penalty per component and backward pass (`components.py`)
        # Under activation checkpointing: whether the output, small relative to its FLOPs, is kept (`recompute.py`).
        self.keeps_output = self.in_features >= 2 * self.out_features
        self.weight, self.bias = weight, bias
        weight.requires_grad_(False)
        if bias is not None:
            bias.requires_grad_(False)

        def trainable(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))

        self.lora_A = None if spec.r is None else trainable(self.in_features, spec.r)
        self.lora_B = None if spec.r is None else trainable(self.out_features, spec.r)
        self.lora_gates = trainable(spec.r) if spec.gated and spec.r is not None else None
        self.magnitude_offset = trainable(self.out_features) if spec.weight_decomposed else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: AdapterSpec) -> "AdaptedLinear":
        """A layer over a plain one's own parameters, initialised as the paper says: y equals the base's output.

        On the meta device, which has no values, that is left to whoever gives the parameters memory.
        """
        layer = cls(cast(nn.Parameter, linear.weight), cast("nn.Parameter | None", linear.bias), spec)
        with torch.no_grad():
            for name, parameter in layer.adapter_parameters().items():
                bound = initial_bound(name, parameter.shape, spec.gated)
                parameter.uniform_(-bound, bound) if bound else parameter.zero_()
        return layer

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the ADAPTER_PARAMETERS that this layer has, by name."""
        found = {name: getattr(self, name) for name in ADAPTER_PARAMETERS}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def gated_B(self) -> Tensor | None:
        """B·diag(c) (out, r), fp32: what a gated layer has in the place of B; B itself where there are no gates."""
        if self.lora_B is None:
            return None
        return self.lora_B.float() if self.lora_gates is None else self.lora_B.float() * self.lora_gates.float()

    def base_product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, in) -> x·W0ᵀ + bias (tokens, out), in x's dtype."""
        return self.storage.project(x, self.weight, bias)

    def base_product_back(self, grad: Tensor) -> Tensor:
        """grad (tokens, out) -> grad·W0 (tokens, in), in grad's dtype."""
        return self.storage.project_back(grad, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out), in x's dtype. Raises RuntimeError before norms were ever computed."""
        spec = self.spec
        dropped = None
        if spec.dropout > 0.0 and self.training:
            dropped = F.dropout(x, spec.dropout)
        return _DoraFunction.apply(x, dropped, self.lora_A, self.lora_B, self.lora_gates, self.magnitude_offset, self)

    def magnitude_excess(self) -> Tensor:
        """g − 1 per output row (out,), fp32: 0 exactly at initialisation, and where ‖V'‖ = 0."""
        if self.norm is None or self.base_norm is None or self.magnitude_offset is None:
            raise RuntimeError(
                "this layer's row norms were never computed: attach a NormRefresher to the model "
                "(dora_dist.adapters.norms) before the first forward"
            )
        excess = (self.base_norm + self.magnitude_offset.float() - self.norm) / self.norm
        return torch.where(self.norm > 0, excess, 0.0)

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptedLinear":
        # Norms follow the module between devices, but never to another dtype: a bf16 norm changes step 0.
        super()._apply(fn, recurse)
        if self.norm is not None and self.base_norm is not None:
            device = fn(torch.empty(0)).device
            self.norm, self.base_norm = self.norm.to(device), self.base_norm.to(device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec}"


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Every AdaptedLinear of a model by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def before_any_forward(model: nn.Module, act: Callable[[], None], prepend: bool = False) -> list[RemovableHandle]:
    """Have `act()` run before the forward of every AdaptedLinear of `model` and of every module around one.

    Whichever of them is called first after an optimizer step, the root or an inner module, acts before anything that
    depends on it runs, and before an engine that is attached later gathers the module's weights.
    """
    adapted = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    around = {name.rsplit(".", depth)[0] for name in adapted for depth in range(name.count(".") + 1)} | {""}
    hooked = [module for name, module in model.named_modules() if name in around]
    return [module.register_forward_pre_hook(lambda *_: act(), prepend=prepend) for module in hooked]


ADAPTER_PARAMETERS = ("lora_A", "lora_B", "lora_gates", "magnitude_offset")
"""A AdaptedLinear's own parameters: trained, and not read from the base."""


def initial_bound(name: str, shape: torch.Size, gated: bool) -> float:
    """An adapter parameter starts as U(−bound, bound); 0 means zeros. ΔW is 0 at the start in either method.

    Without gates, lora_A has kaiming_uniform(a=√5), all else 0 (Liu, section 4.1). With gates, which start at 0,
    lora_A and lora_B have kaiming_uniform(a=0) (Mao, section 3.1).
    """
    fan_in = shape[0] if name == "lora_A" else shape[-1]
    if gated and name in ("lora_A", "lora_B"):
        return math.sqrt(6 / fan_in)
    return 1 / math.sqrt(fan_in) if name == "lora_A" else 0.0


class _DoraFunction(torch.autograd.Function):
    """The layer's product and its gradients, on full or on gathered weights alike.

    The context keeps Parameter OBJECTS, not their data: ZeRO-3 frees the data after forward and gathers it again
    before backward. In the names, t = tokens, i = in, o = out, r = adapter rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        lora_gates: Tensor | None,
        magnitude_offset: Tensor | None,
        layer: AdaptedLinear,
    ) -> Tensor:
        ctx.layer = layer
        ctx.x_shape = x.shape
        x_ti = x.reshape(-1, x.shape[-1])
        xd_ti = x_ti if dropped is None else dropped.reshape(-1, x.shape[-1])
        ctx.two_base_products = (
            dropped is not None and magnitude_offset is not None and layer.spec.dropout_mode == "exact"
        )
        hidden_tr = gated_tr = None
        if lora_A is not None and lora_B is not None:
            hidden_tr = xd_ti @ lora_A
            gated_tr = hidden_tr if lora_gates is None else hidden_tr * lora_gates

        def unscaled(x_ti: Tensor, bias: Tensor | None) -> Tensor:
            y_to = layer.base_product(x_ti, bias)
            if gated_tr is not None and lora_B is not None:
                y_to.addmm_(gated_tr, lora_B.t(), alpha=layer.spec.scaling)
            return y_to

        # Where nothing sets u apart from y, a recomputation then needs no product with the weight at all.
        keeps = layer.keeps_output and magnitude_offset is not None and layer.bias is None and not ctx.two_base_products
        y_to = kept_output(layer, lambda: unscaled(x_ti, None)) if keeps else unscaled(x_ti, layer.bias)
        if magnitude_offset is None:
            ctx.save_for_backward(xd_ti, hidden_tr, None, None)
            return y_to.view(*x.shape[:-1], -1)

        if ctx.two_base_products:
            u_to = unscaled(xd_ti, None)
        elif layer.bias is None:
            u_to = y_to
        else:
            u_to = y_to - layer.bias
        excess_o = layer.magnitude_excess()
        ctx.save_for_backward(xd_ti, hidden_tr, u_to, excess_o)
        return torch.addcmul(y_to, u_to, excess_o.to(y_to.dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: AdaptedLinear = ctx.layer
        lora_A, lora_B, lora_gates = layer.lora_A, layer.lora_B, layer.lora_gates
        xd_ti, hidden_tr, u_to, excess_o = ctx.saved_tensors
        g_to = grads[0].reshape(-1, layer.out_features)
        need_x, need_dropped = ctx.needs_input_grad[:2]

        grad_offset, gu_to, du_to, q_o = None, None, g_to, None
        if u_to is not None and layer.norm is not None:
            q_o = _column_dot(g_to, u_to)
            grad_offset = _safe_divide(q_o, layer.norm).to(u_to.dtype)
            gu_to = g_to * excess_o.to(g_to.dtype) if ctx.two_base_products else None
            du_to = g_to + gu_to if gu_to is not None else torch.addcmul(g_to, g_to, excess_o.to(g_to.dtype))

        grad_x = grad_dropped = None
        if need_x:
            grad_x = layer.base_product_back(g_to if ctx.two_base_products else du_to)
        if need_dropped and gu_to is not None:
            grad_dropped = layer.base_product_back(gu_to)

        grad_A = grad_B = grad_gates = None
        if hidden_tr is not None and lora_A is not None and lora_B is not None:
            dh_tr = (du_to @ lora_B).mul_(layer.spec.scaling)
            gated_tr = hidden_tr
            if lora_gates is not None:
                grad_gates = _column_dot(dh_tr, hidden_tr)
                gated_tr = hidden_tr * lora_gates
                dh_tr = dh_tr * lora_gates
            grad_B = (du_to.t() @ gated_tr).mul_(layer.spec.scaling)
            grad_A = xd_ti.t() @ dh_tr
            if layer.spec.norm_gradient == "full" and q_o is not None:
                _add_norm_gradient(layer, q_o, grad_A, grad_B, grad_gates)
            if layer.dem_weight:
                for grad, factor in ((grad_A, lora_A), (grad_B, lora_B)):
                    grad.add_((factor - factor.mean(0)) * (2 * layer.dem_weight / max(factor.shape[0] - 1, 1)))
            if grad_gates is not None:
                grad_gates = grad_gates.to(grad_A.dtype)
            if need_dropped:
                low_rank = dh_tr @ lora_A.t()
                grad_dropped = low_rank if grad_dropped is None else grad_dropped.add_(low_rank)
            elif grad_x is not None:
                grad_x.addmm_(dh_tr, lora_A.t())

        shaped = [None if g is None else g.view(ctx.x_shape) for g in (grad_x, grad_dropped)]
        return (*shaped, grad_A, grad_B, grad_gates, grad_offset, None)


def _column_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_t a⊙b over rows, fp32 (columns,); the fp32 temporary is at most 64 MiB, and on a CPU fits the cache."""
    max_rows = max(1, (2**17 if a.device.type == "cpu" else 2**24) // a.shape[1])
    total = torch.zeros(a.shape[1], dtype=torch.float32, device=a.device)
    for rows_a, rows_b in zip(a.split(max_rows), b.split(max_rows), strict=True):
        total += (rows_a.float() * rows_b).sum(0)
    return total


def _safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: a zero row has g = 1 by definition, whatever its magnitude."""
    return torch.where(b > 0, a / b, 0.0)


def _add_norm_gradient(
    layer: AdaptedLinear, q_o: Tensor, grad_A: Tensor, grad_B: Tensor, grad_gates: Tensor | None
) -> None:
    """The gradient's path through n (Liu, equation 6), in place: dL/dV' gains −(m·q / n³)·V' per row, q = Σ_t G⊙u.

    Neither V' nor its gradient is ever built: both factors reach W0 through r-row products. With gates, B stands
    for B·diag(c), and its gradient is handed on to B and c.
    """
    s, dtype = layer.spec.scaling, grad_A.dtype
    lora_A, gated_B = layer.lora_A, layer.gated_B()
    assert lora_A is not None and gated_B is not None and layer.lora_B is not None and layer.norm is not None
    B = gated_B.to(dtype)
    m_over_n = 1.0 + layer.magnitude_excess()
    d_o = -_safe_divide(m_over_n * q_o, layer.norm.square())
    scaled_B = (gated_B * d_o[:, None]).to(dtype)  # D·B
    v_a = layer.base_product(lora_A.t()).t() + s * (B @ (lora_A.t() @ lora_A))  # V'·A (out, r)
    to_B = v_a.float() * (s * d_o[:, None])
    if layer.lora_gates is not None and grad_gates is not None:
        grad_gates.add_((to_B * layer.lora_B).sum(0))
        to_B = to_B * layer.lora_gates
    grad_B.add_(to_B.to(dtype))
    bdv = layer.base_product_back(scaled_B.t()) + s * (scaled_B.t() @ B) @ lora_A.t()  # (r, in)
    grad_A.add_(bdv.t(), alpha=s)
