"""`Update`: a method that adds ΔW to a layer's frozen weight, without a magnitude over their sum.

A method of the package is one of these; `methods.weight_decomposed` puts a magnitude over any of them.

Suffixes of tensors that have a row per token: t = tokens, i = in, o = out, r = adapter rank.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from dora_dist.adapters.method import AdapterMethod, Gradients, Layer, MergeRows, Needs, Saved, Shape, Tensors
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.adapters.recompute import Products, kept_products
from dora_dist.config.adapter import AdapterConfig
from dora_dist.runtime.errors import UserError

Own = TypeVar("Own", bound="Update")


@dataclass(frozen=True, kw_only=True)
class Update(AdapterMethod):
    """A method without magnitude: y = W0·x + ΔW·x + bias, where ΔW·x = up(down(x)).

    `methods.factored.Factored` is all that a ΔW of two factors needs. Settings are the fields of the dataclass that
    take part in comparisons.
    """

    name: ClassVar[str]
    titles: ClassVar[tuple[str, str]]
    """What people call it, plain and with a magnitude over it."""
    of_training: ClassVar[frozenset[str]] = frozenset({"dropout"})
    """Settings that say how it is trained, and not what it computes with given parameters."""
    weight_decomposed = False
    in_peft = True
    in_peft_with_magnitude = True
    """The same of it under a magnitude."""
    dropout: float = 0.0

    @classmethod
    def from_config(cls: type[Own], adapter: AdapterConfig) -> Own:
        """Fields of the adapter section that are fields here too, and all of its `settings`.

        `r` is the rank that training starts from, which is above adapter.r with dynamic rank; where the section has
        none, it is the default here.
        """
        every = {field.name for field in cls._settings()}
        shared = every & set(AdapterConfig.model_fields)
        own = every - shared
        if strangers := sorted(set(adapter.settings) - own):
            raise UserError(
                f"adapter.settings: {strangers[0]!r} is not a setting of the method {cls.name!r}; it has: "
                f"{', '.join(sorted(own)) or 'none'}"
            )
        alpha, usual = adapter.lora_alpha, AdapterConfig.model_fields["lora_alpha"].default
        if "lora_alpha" not in shared and alpha != usual:
            raise UserError(
                f"adapter.lora_alpha = {alpha:g}: the method {cls.name!r} does not scale its update; take it out"
            )
        if "lora_alpha" not in shared and adapter.use_rslora:
            raise UserError(
                f"adapter.use_rslora = true: the method {cls.name!r} does not scale its update; set it to false"
            )
        taken = {name: getattr(adapter, name) for name in shared - {"r"}}
        if "r" in shared and adapter.start_rank is not None:
            taken["r"] = adapter.start_rank
        return cls(**taken | adapter.settings)

    @abstractmethod
    def down(self, layer: Layer, x_ti: Tensor) -> Tensor | None:
        """The part of ΔW·x that backward needs again besides x (tokens, ...); None: nothing, x itself will do.

        Not x nor a view of it: checkpointing may keep what this gives, and would keep x with it.
        """

    @abstractmethod
    def add_up(self, layer: Layer, hidden: Tensor, y_to: Tensor) -> None:
        """y += ΔW·x in place, given `down` of x, or x where that is None."""

    @abstractmethod
    def gradients(
        self, layer: Layer, x_ti: Tensor, hidden: Tensor | None, *, grad_to: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Gradients of the parameters, and what `input_gradient` needs, given `down` of x and the gradient of ΔW·x.

        What it needs is the gradient of the product that `down` makes of x, or anything else with a row per token.
        """

    @abstractmethod
    def input_gradient(self, layer: Layer, grad_hidden: Tensor, onto: Tensor | None) -> Tensor:
        """The gradient of x (tokens, in), given what `gradients` says; added in place to `onto` if given."""

    @abstractmethod
    def add_norm_gradient(self, layer: Layer, row_scale: Tensor, gradients: dict[str, Tensor]) -> None:
        """Add in place what follows from a gradient row_scale_o·V'_o of every row of V' = W0 + ΔW (out, in)."""

    def merger(self, shape: Shape, values: Tensors) -> MergeRows:
        factors = self.to_peft(shape, values, None)
        return (lambda weight, start: None) if factors is None else factors.merge_rows

    def add_penalty(self, layer: Layer, gradients: dict[str, Tensor]) -> None:
        """Add the gradient of a penalty on the parameters, where the method has one, in place."""
        return

    @property
    def title(self) -> str:
        return self.titles[0]

    def settings(self) -> dict[str, Any]:
        common = {"weight_decomposed": self.weight_decomposed, "gated": self.components is not None}
        return {"method": self.name, **{field.name: getattr(self, field.name) for field in self._settings()}, **common}

    def function_settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings().items() if name not in {*self.of_training, "gated"}}

    @classmethod
    def _settings(cls) -> list[Field[Any]]:
        return [field for field in fields(cls) if field.compare]

    def norm_parameters(self, shape: Shape) -> Sequence[str]:
        return tuple(self.parameters(shape))

    def forward(self, layer: Layer, x_ti: Tensor, dropped_ti: Tensor | None) -> tuple[Tensor, Saved]:
        xd_ti = x_ti if dropped_ti is None else dropped_ti

        def products() -> Products:
            hidden = self.down(layer, xd_ti)
            y_to = layer.base_product(x_ti, layer.bias)
            self.add_up(layer, xd_ti if hidden is None else hidden, y_to)
            return y_to, hidden

        y_to, hidden = kept_products(layer, products)
        assert y_to is not None
        return y_to, (xd_ti, hidden)

    def backward(self, layer: Layer, saved: Saved, grad_to: Tensor, *, needs: Needs) -> Gradients:
        xd_ti, hidden = saved
        assert xd_ti is not None
        grad_x = layer.base_product_back(grad_to) if needs.x else None
        found, grad_hidden = self.gradients(layer, xd_ti, hidden, grad_to=grad_to)
        self.add_penalty(layer, found)
        return self.with_input_gradient(layer, grad_hidden, Gradients(grad_x, None, found), needs=needs)

    def with_input_gradient(
        self, layer: Layer, grad_hidden: Tensor | None, found: Gradients, *, needs: Needs
    ) -> Gradients:
        """`found` with the update's part of the input's gradient: through the dropped copy, where there is one."""
        if grad_hidden is None:
            return found
        if needs.dropped:
            own = self.input_gradient(layer, grad_hidden, None)
            return found._replace(dropped=own if found.dropped is None else found.dropped.add_(own))
        if found.x is not None:
            return found._replace(x=self.input_gradient(layer, grad_hidden, found.x))
        return found

    def from_peft(self, theirs: AdapterLayer, base_norm: Tensor | None) -> dict[str, Tensor]:
        raise UserError(
            f"adapter.init_from: the method {self.name!r} does not start from a PEFT folder; set it to null"
        )

    def differences(self, theirs: AdapterLayer) -> Iterator[str]:
        yield f"the method {self.name!r} does not start from a PEFT folder (set adapter.init_from to null)"

    def resized(self, r: int) -> "Update | None":
        if self.components is not None:
            raise TypeError(f"{type(self).__name__}.resized must say what is left of it with fewer components")
        return self

    def magnitude_only(self) -> AdapterMethod:
        raise ValueError("a module with neither low-rank factors (r) nor a magnitude would train nothing")
