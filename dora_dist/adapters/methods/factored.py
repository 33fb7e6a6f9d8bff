"""Updates of two thin factors, ΔW = s·B·Aᵀ, whatever the factors are made of."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_dist.adapters.method import Layer, RowProducts, RowSquares, Shape, Tensors
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.adapters.update import Update


@dataclass(frozen=True, kw_only=True)
class Factored(Update):
    """An update whose factors are a function of its parameters: `parameters`, `factors` and `scaling` say everything.

    What follows from them here: products and gradients, row norms, PEFT's form. A method that knows a cheaper way for
    one of these overrides it.
    """

    @abstractmethod
    def factors(self, shape: Shape, parameters: Tensors) -> tuple[Tensor, Tensor]:
        """A (in, r) and B (out, r), differentiable, in the parameters' dtype and on their device."""

    @property
    def lora_alpha(self) -> float:
        return self.scaling * self.r

    def down(self, layer: Layer, x_ti: Tensor) -> Tensor:
        return x_ti @ self._factors(layer)[0]

    def add_up(self, layer: Layer, hidden: Tensor, y_to: Tensor) -> None:
        y_to.addmm_(hidden, self._factors(layer)[1].t(), alpha=self.scaling)

    def gradients(
        self, layer: Layer, x_ti: Tensor, hidden: Tensor | None, *, grad_to: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        assert hidden is not None
        grad_hidden = (grad_to @ self._factors(layer)[1]).mul_(self.scaling)
        grad_B = (grad_to.t() @ hidden).mul_(self.scaling)
        return self.through_factors(layer, x_ti.t() @ grad_hidden, grad_B), grad_hidden

    def input_gradient(self, layer: Layer, grad_hidden: Tensor, onto: Tensor | None) -> Tensor:
        A_ri = self._factors(layer)[0].t()
        return grad_hidden @ A_ri if onto is None else onto.addmm_(grad_hidden, A_ri)

    def through_factors(self, layer: Layer, grad_A: Tensor, grad_B: Tensor) -> dict[str, Tensor]:
        """The parameters' gradients, given those of A (in, r) and B (out, r): by autograd, which knows `factors`."""
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in self._own(layer).items()}
            pairs = zip(self.factors(layer.shape, leaves), (grad_A, grad_B), strict=True)
            loss = torch.stack([(factor * grad).sum() for factor, grad in pairs]).sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def add_norm_gradient(self, layer: Layer, row_scale: Tensor, gradients: dict[str, Tensor]) -> None:
        """Add the gradients through the norm. Neither V' nor its gradient is built: W0 multiplies r rows at a time."""
        s = self.scaling
        own = self._own(layer)
        dtype = next(iter(own.values())).dtype
        A32, B32 = self._factors_fp32(layer.shape, own)
        A, B = A32.to(dtype), B32.to(dtype)
        scaled_B = (B32 * row_scale[:, None]).to(dtype)
        v_a = layer.base_product(A.t()).t() + s * (B @ (A.t() @ A))  # V'·A (out, r)
        to_B = v_a.float() * (s * row_scale[:, None])
        to_A = (layer.base_product_back(scaled_B.t()) + s * (scaled_B.t() @ B) @ A.t()).t()  # still without s
        self.add_to_gradients(layer, to_A, to_B, gradients=gradients)

    def add_to_gradients(
        self, layer: Layer, unscaled_A: Tensor, grad_B: Tensor, *, gradients: dict[str, Tensor]
    ) -> None:
        """Add in place what follows from a further gradient of A, which still lacks the factor s, and of B (fp32)."""
        for name, further in self.through_factors(layer, unscaled_A * self.scaling, grad_B).items():
            gradients[name].add_(further)

    def row_products(self, shape: Shape, parameters: Tensors) -> RowProducts:
        """s·rowsum((W0·A)⊙B) and s²·rowsum((B·(AᵀA))⊙B), the second charged to a row's first element."""
        s = self.scaling
        A, B = self._factors_fp32(shape, parameters)
        gram = A.t() @ A

        def products(w: Tensor, row: int, col: int) -> tuple[Tensor, Tensor]:
            B_rows = B[row : row + w.shape[0]]
            cross = ((w @ A[col : col + w.shape[1]]) * B_rows).sum(1).mul_(s)
            if col > 0:
                return cross, torch.zeros_like(cross)
            return cross, ((B_rows @ gram) * B_rows).sum(1).mul_(s * s)

        return products

    def row_squares(self, shape: Shape, parameters: Tensors) -> RowSquares:
        """2s·rowsum((W0·A)⊙B) + s²·rowsum((B·(AᵀA))⊙B), the second term charged to a row's first element.

        Both terms in one product with B: half the passes over (rows, r).
        """
        s = self.scaling
        A, B = self._factors_fp32(shape, parameters)
        gram = A.t() @ A

        def share(w: Tensor, row: int, col: int) -> Tensor:
            B_rows = B[row : row + w.shape[0]]
            inner = (w @ A[col : col + w.shape[1]]).mul_(2 * s)
            if col == 0:
                inner.addmm_(B_rows, gram, alpha=s * s)
            return (inner * B_rows).sum(1)

        return share

    def to_peft(self, shape: Shape, values: Tensors, base_norm: Tensor | None) -> AdapterLayer | None:
        if not values:
            return None
        A, B = self.factors(shape, values)
        return AdapterLayer(A.t().contiguous(), B, None, self.scaling, shape[1])

    def _factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        return self.factors(layer.shape, layer.adapter_parameters())

    def _own(self, layer: Layer) -> Tensors:
        """The update's parameters, without a magnitude's."""
        every = layer.adapter_parameters()
        return {name: every[name] for name in self.parameters(layer.shape)}

    def _factors_fp32(self, shape: Shape, parameters: Tensors) -> tuple[Tensor, Tensor]:
        return self.factors(shape, {name: p.float() for name, p in parameters.items()})
