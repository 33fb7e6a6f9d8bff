"""Weight decomposition: a magnitude per output row over any update, or over none.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024 (arXiv 2402.09353), for ΔW = s·B·Aᵀ. With
V' = W0 + ΔW,

    n = row norms of V'        m = ‖W0‖ + δ        g = m / n
    y = x·W0ᵀ + (g − 1)⊙(xd·W0ᵀ) + g⊙(xd·ΔWᵀ) + bias          xd = dropout(x)

n is a function of parameters only: whoever owns the layer refreshes it once per optimizer step (`norms.py`), and
nothing here ever computes it. All arithmetic on m, n and g is fp32; what multiplies activations is g − 1, whose
low-precision rounding is relative to the CHANGE of the magnitude, not to the magnitude.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from dora_dist.adapters.method import (
    AdapterMethod,
    Components,
    Gradients,
    Initial,
    Layer,
    MergeRows,
    Needs,
    RowProducts,
    RowSquares,
    Saved,
    Shape,
    Tensors,
)
from dora_dist.adapters.methods.sums import column_dot
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.adapters.recompute import Products, kept_products
from dora_dist.adapters.row_norms import give_norms, row_norms
from dora_dist.adapters.update import Update

OFFSET = "magnitude_offset"
NormGradient = Literal["detached", "full"]
DropoutMode = Literal["exact", "adapter"]


@dataclass(frozen=True, kw_only=True)
class NoUpdate(Update):
    """ΔW = 0: what is below the magnitude of a module that trains its magnitude alone (Liu, Table 6)."""

    name = "none"
    titles = ("nothing", "magnitudes")

    @property
    def r(self) -> int:
        return 0

    @property
    def lora_alpha(self) -> float:
        return 1.0

    @property
    def scaling(self) -> float:
        return 0.0

    def parameters(self, shape: Shape) -> dict[str, Initial]:
        return {}

    def down(self, layer: Layer, x_ti: Tensor) -> None:
        return None

    def add_up(self, layer: Layer, hidden: Tensor, y_to: Tensor) -> None:
        return

    def gradients(
        self, layer: Layer, x_ti: Tensor, hidden: Tensor | None, *, grad_to: Tensor
    ) -> tuple[dict[str, Tensor], None]:
        return {}, None

    def input_gradient(self, layer: Layer, grad_hidden: Tensor, onto: Tensor | None) -> Tensor:
        raise AssertionError("nothing goes through an update that is not there")

    def add_norm_gradient(self, layer: Layer, row_scale: Tensor, gradients: dict[str, Tensor]) -> None:
        return

    def row_products(self, shape: Shape, parameters: Tensors) -> None:
        return None

    def to_peft(self, shape: Shape, values: Tensors, base_norm: Tensor | None) -> None:
        return None

    def from_peft(self, theirs: AdapterLayer, base_norm: Tensor | None) -> dict[str, Tensor]:
        return {}

    def differences(self, theirs: AdapterLayer) -> Iterator[str]:
        if theirs.r is not None:
            yield "it has low-rank factors there (take it out of adapter.magnitude_only_modules)"


@dataclass(frozen=True)
class WeightDecomposed(AdapterMethod):
    """A magnitude over `update`; its parameter `magnitude_offset` δ (out,) starts at 0.

    `dropout_mode` "exact" drops the input of everything but the undropped base product, as the paper's formula says;
    "adapter" drops the update's input alone and saves one base product. `norm_gradient` "detached" is Liu's section
    4.3; "full" lets the gradient flow through n.
    """

    weight_decomposed = True
    magnitude = OFFSET
    update: Update = NoUpdate()
    dropout_mode: DropoutMode = "exact"
    norm_gradient: NormGradient = "detached"

    @property
    def title(self) -> str:
        return self.update.titles[1]

    @property
    def r(self) -> int:
        return self.update.r

    @property
    def lora_alpha(self) -> float:
        return self.update.lora_alpha

    @property
    def scaling(self) -> float:
        return self.update.scaling

    @property
    def use_rslora(self) -> bool:
        return self.update.use_rslora

    @property
    def dropout(self) -> float:
        return self.update.dropout

    @property
    def components(self) -> Components | None:
        return self.update.components

    def settings(self) -> dict[str, Any]:
        own = {"weight_decomposed": True, "dropout_mode": self.dropout_mode, "norm_gradient": self.norm_gradient}
        return self.update.settings() | own

    def function_settings(self) -> dict[str, Any]:
        return self.update.function_settings() | {"weight_decomposed": True}

    def for_model(self, shapes: Collection[Shape]) -> Self:
        return replace(self, update=self.update.for_model(shapes))

    def shared_digest(self) -> str:
        return self.update.shared_digest()

    def largest_useful_r(self, shape: Shape) -> int | None:
        return self.update.largest_useful_r(shape)

    def parameters(self, shape: Shape) -> dict[str, Initial]:
        return self.update.parameters(shape) | {OFFSET: Initial((shape[0],))}

    def magnitude_excess(self, layer: Layer) -> Tensor:
        """g − 1 per output row (out,), fp32: 0 exactly at initialisation, and where ‖V'‖ = 0."""
        if layer.norm is None or layer.base_norm is None:
            raise RuntimeError(
                "this layer's row norms were never computed: attach a NormRefresher to the model "
                "(dora_dist.adapters.norms) before the first forward"
            )
        excess = (layer.base_norm + layer.adapter_parameters()[OFFSET].float() - layer.norm) / layer.norm
        return torch.where(layer.norm > 0, excess, 0.0)

    def forward(self, layer: Layer, x_ti: Tensor, dropped_ti: Tensor | None) -> tuple[Tensor, Saved]:
        xd_ti = x_ti if dropped_ti is None else dropped_ti
        two_products = dropped_ti is not None and self.dropout_mode == "exact"

        def undecomposed(x_ti: Tensor, hidden: Tensor | None, bias: Tensor | None) -> Tensor:
            y_to = layer.base_product(x_ti, bias)
            self.update.add_up(layer, xd_ti if hidden is None else hidden, y_to)
            return y_to

        def products() -> Products:
            """All that needs a parameter. u = V'·xd is not among them where it follows from y."""
            hidden = self.update.down(layer, xd_ti)
            y_to = undecomposed(x_ti, hidden, layer.bias)
            u_to = undecomposed(xd_ti, hidden, None) if two_products else None
            bias_o = None if layer.bias is None or two_products else layer.bias.detach().clone()
            return y_to, u_to, hidden, bias_o, self.magnitude_excess(layer)

        y_to, u_to, hidden, bias_o, excess_o = kept_products(layer, products)
        assert y_to is not None and excess_o is not None
        if u_to is None:
            u_to = y_to if bias_o is None else y_to - bias_o
        return torch.addcmul(y_to, u_to, excess_o.to(y_to.dtype)), (xd_ti, hidden, u_to, excess_o)

    def backward(self, layer: Layer, saved: Saved, grad_to: Tensor, *, needs: Needs) -> Gradients:
        xd_ti, hidden, u_to, excess_o = saved
        assert xd_ti is not None and u_to is not None and excess_o is not None and layer.norm is not None
        two_products = needs.had_dropped and self.dropout_mode == "exact"
        q_o = column_dot(grad_to, u_to)
        grad_dropped = None
        if two_products:
            scaled_to = grad_to * excess_o.to(grad_to.dtype)
            du_to = grad_to + scaled_to
            grad_x = layer.base_product_back(grad_to) if needs.x else None
            grad_dropped = layer.base_product_back(scaled_to) if needs.dropped else None
        else:
            du_to = torch.addcmul(grad_to, grad_to, excess_o.to(grad_to.dtype))
            grad_x = layer.base_product_back(du_to) if needs.x else None
        found, grad_hidden = self.update.gradients(layer, xd_ti, hidden, grad_to=du_to)
        if self.norm_gradient == "full":  # Liu, equation 6: dL/dV' gains −(m·q / n³)·V' per row, q = Σ_t G⊙u
            m_over_n = 1.0 + self.magnitude_excess(layer)
            row_scale = -_safe_divide(m_over_n * q_o, layer.norm.square())
            self.update.add_norm_gradient(layer, row_scale, found)
        self.update.add_penalty(layer, found)
        found[OFFSET] = _safe_divide(q_o, layer.norm)
        return self.update.with_input_gradient(layer, grad_hidden, Gradients(grad_x, grad_dropped, found), needs=needs)

    def norm_parameters(self, shape: Shape) -> Sequence[str]:
        return self.update.norm_parameters(shape)

    def row_products(self, shape: Shape, parameters: Tensors) -> RowProducts | None:
        return self.update.row_products(shape, _without_magnitude(parameters))

    def row_squares(self, shape: Shape, parameters: Tensors) -> RowSquares | None:
        return self.update.row_squares(shape, _without_magnitude(parameters))

    def merger(self, shape: Shape, values: Tensors) -> MergeRows:
        merge_update, offset = self.update.merger(shape, _without_magnitude(values)), values[OFFSET]

        def merge(weight: Tensor, start: int) -> None:
            magnitude = row_norms(weight) + offset[start : start + len(weight)]
            merge_update(weight, start)
            give_norms(weight, magnitude)

        return merge

    @property
    def in_peft(self) -> bool:
        return self.update.in_peft and self.update.in_peft_with_magnitude

    @property
    def expressible_in_peft(self) -> bool:
        return self.update.expressible_in_peft

    def to_peft(self, shape: Shape, values: Tensors, base_norm: Tensor | None) -> AdapterLayer:
        assert base_norm is not None
        layer = self.update.to_peft(shape, _without_magnitude(values), base_norm)
        magnitude = base_norm + values[OFFSET]
        if layer is None:
            return AdapterLayer(None, None, magnitude, self.scaling, shape[1])
        return layer.with_magnitude(magnitude)

    def from_peft(self, theirs: AdapterLayer, base_norm: Tensor | None) -> dict[str, Tensor]:
        assert theirs.magnitude is not None and base_norm is not None
        offset = theirs.magnitude.to(base_norm.device) - base_norm
        return self.update.from_peft(theirs, base_norm) | {OFFSET: offset}

    def differences(self, theirs: AdapterLayer) -> Iterator[str]:
        if theirs.magnitude is None:
            yield f"it is {theirs.title} (set adapter.weight_decomposed to false)"
        yield from self.update.differences(theirs)

    def resized(self, r: int) -> AdapterMethod:
        smaller = self.update.resized(r)
        return self.magnitude_only() if smaller is None else replace(self, update=smaller)

    def magnitude_only(self) -> AdapterMethod:
        return replace(self, update=NoUpdate(dropout=self.dropout))


def _without_magnitude(values: Tensors) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if name != OFFSET}


def _safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: a zero row has g = 1 by definition, whatever its magnitude."""
    return torch.where(b > 0, a / b, 0.0)
