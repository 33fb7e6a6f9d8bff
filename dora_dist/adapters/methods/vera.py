"""VeRA: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024 (arXiv 2310.11454).

ΔW = diag(b)·B·diag(d)·A, where A (r, in) and B (out, r) are random, frozen, and shared by all layers (`Projection`); a
layer trains d (r,) and b (out,). With a magnitude over it, it is DVoRA (Liu et al., arXiv 2402.09353, section 5.5).

Products of a layer, for t tokens: forward t·r·(in + out), backward t·r·(in + 2·out); LoRA's own backward has another
t·r·in, which a frozen A does not need. Beyond activations there are temporaries of (out, r) only.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from dora_dist.adapters.method import Initial, Layer, RowProducts, Shape, Tensors, register
from dora_dist.adapters.methods.sums import column_dot
from dora_dist.adapters.peft_layer import AdapterLayer, VeraLayer
from dora_dist.adapters.projection import KEYS, Projection
from dora_dist.adapters.update import Update
from dora_dist.runtime.errors import UserError

D, B = "vera_lambda_d", "vera_lambda_b"


@register
@dataclass(frozen=True)
class Vera(Update):
    """The update of two vectors; its parameters are `vera_lambda_d` (r,), from `d_initial`, and `vera_lambda_b` (out,).

    `projection_prng_key` is what the shared matrices are drawn from.
    """

    name = "vera"
    titles = ("VeRA", "DVoRA")
    of_training = frozenset({"dropout", "d_initial"})
    scaling = 1.0
    in_peft_with_magnitude = False  # as LoRA each layer has its own A and B, too much for every checkpoint
    r: int = 256
    projection_prng_key: int = 0
    d_initial: float = 0.1
    projection: Projection | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.projection_prng_key) is not int or self.projection_prng_key not in KEYS:
            raise UserError(
                f"adapter.settings: projection_prng_key = {self.projection_prng_key!r} must be a whole number from "
                f"{KEYS.start} to {KEYS.stop - 1}"
            )
        if not isinstance(self.d_initial, int | float) or not math.isfinite(self.d_initial) or self.d_initial == 0:
            raise UserError(
                f"adapter.settings: d_initial = {self.d_initial!r} must be a number other than 0 (with which nothing "
                "would ever train); the paper has 0.1"
            )

    @property
    def lora_alpha(self) -> float:
        return float(self.r)

    def for_model(self, shapes: Collection[Shape]) -> Self:
        return replace(self, projection=Projection.over(shapes, key=self.projection_prng_key, r=self.r))

    def shared_digest(self) -> str:
        return self._shared.digest

    def parameters(self, shape: Shape) -> dict[str, Initial]:
        """b is 0, so ΔW is (section 3.1 of the paper)."""
        return {D: Initial((self.r,), value=self.d_initial), B: Initial((shape[0],))}

    def down(self, layer: Layer, x_ti: Tensor) -> Tensor:
        return x_ti @ self._views(layer)[0].t()

    def add_up(self, layer: Layer, hidden: Tensor, y_to: Tensor) -> None:
        d, b = self._vectors(layer)
        y_to.addmm_(hidden * d, (self._views(layer)[1] * b[:, None]).t())

    def gradients(
        self, layer: Layer, x_ti: Tensor, hidden: Tensor | None, *, grad_to: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        assert hidden is not None
        (d, b), B_or = self._vectors(layer), self._views(layer)[1]
        grad_scaled = grad_to @ (B_or * b[:, None])  # of h·diag(d)
        through_B = grad_to.t() @ (hidden * d)  # (out, r), less than a value per token and output
        found = {D: column_dot(grad_scaled, hidden), B: _row_dot(through_B, B_or)}
        return found, grad_scaled.mul_(d)

    def input_gradient(self, layer: Layer, grad_hidden: Tensor, onto: Tensor | None) -> Tensor:
        A_ri = self._views(layer)[0]
        return grad_hidden @ A_ri if onto is None else onto.addmm_(grad_hidden, A_ri)

    def add_norm_gradient(self, layer: Layer, row_scale: Tensor, gradients: dict[str, Tensor]) -> None:
        """Both follow from V'·Aᵀ (out, r): W0 multiplies r rows, and nothing comes back through it, as A is frozen."""
        (d, b), (A_ri, B_or) = self._vectors(layer), self._views(layer)
        gram = self._shared.gram(layer.shape[1], A_ri)
        v_a = layer.base_product(A_ri).t().float()
        v_a.addcmul_(b.float()[:, None], (B_or.float() * d) @ gram)
        v_a.mul_(B_or)
        gradients[B].add_((v_a @ d.float()).mul_(row_scale))
        gradients[D].add_((row_scale * b) @ v_a)

    def row_products(self, shape: Shape, parameters: Tensors) -> RowProducts:
        """b⊙rowsum((W0·Aᵀ)⊙(B·diag(d))) and b²⊙rowsum((B·diag(d)·A·Aᵀ)⊙(B·diag(d))), the second charged to a row's
        first element.
        """
        d, b = parameters[D].float(), parameters[B].float()
        A_ri, B_or = self._shared.views(shape, parameters[D])
        gram, A_ir = self._shared.gram(shape[1], A_ri), A_ri.float().t()

        def products(w: Tensor, row: int, col: int) -> tuple[Tensor, Tensor]:
            rows = slice(row, row + w.shape[0])
            scaled = B_or[rows].float() * d
            cross = ((w @ A_ir[col : col + w.shape[1]]) * scaled).sum(1).mul_(b[rows])
            if col > 0:
                return cross, cross.new_zeros(len(cross))
            return cross, ((scaled @ gram) * scaled).sum(1).mul_(b[rows].square())

        return products

    def to_peft(self, shape: Shape, values: Tensors, base_norm: Tensor | None) -> VeraLayer:
        return VeraLayer(
            lambda_d=values[D],
            lambda_b=values[B],
            prng_key=self.projection_prng_key,
            projection_digest=self._shared.digest,
            in_features=shape[1],
            projection=self._shared,
        )

    def from_peft(self, theirs: AdapterLayer, base_norm: Tensor | None) -> dict[str, Tensor]:
        """Raises UserError where `theirs` was trained with other matrices than those drawn here."""
        assert isinstance(theirs, VeraLayer)
        self._shared.check(theirs.projection_digest, "the adapter")
        return {D: theirs.lambda_d, B: theirs.lambda_b}

    def differences(self, theirs: AdapterLayer) -> Iterator[str]:
        if not isinstance(theirs, VeraLayer):
            yield f"it is {theirs.title} (set adapter.method to null)"
            return
        if theirs.r != self.r:
            yield f"its r is {theirs.r}, adapter.r = {self.r} (set it to {theirs.r})"
        if theirs.prng_key != self.projection_prng_key:
            given = f"adapter.settings has {self.projection_prng_key} (set it to {theirs.prng_key})"
            yield f"its projection_prng_key is {theirs.prng_key}, {given}"
        if theirs.projection is not None and theirs.projection.widest != self._shared.widest:
            yield (
                f"its shared matrices are for layers of up to {theirs.projection.widest}, those here for "
                f"{self._shared.widest} (set adapter.target_modules to the adapter's)"
            )

    @property
    def _shared(self) -> Projection:
        if self.projection is None:
            raise RuntimeError("VeRA's layers share matrices: make them with `for_model` of all layers' shapes")
        return self.projection

    def _views(self, layer: Layer) -> tuple[Tensor, Tensor]:
        return self._shared.views(layer.shape, layer.adapter_parameters()[D])

    def _vectors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        own = layer.adapter_parameters()
        return own[D], own[B]


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_r a⊙b (rows,), fp32."""
    return (a.float() * b).sum(1)
