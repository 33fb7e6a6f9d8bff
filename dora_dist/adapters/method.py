"""What an adapted layer asks of the method that adapts it, and the registry of methods.

A layer's frozen weight is W0 (out, in). A method says which parameters the layer gets besides it, what function they
make of it, and how they are written into a PEFT folder. It is a frozen object that holds settings: one object serves
any number of layers, and holds what they share. The concrete ones are in `methods/`; examples/add_a_method.py adds
another.

Suffixes of tensors that have a row per token: t = tokens, i = in, o = out, r = adapter rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

from torch import Tensor, nn

from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.config.adapter import AdapterConfig

Shape = tuple[int, int]
"""(out, in) of an adapted weight."""
Tensors = Mapping[str, Tensor]
"""A layer's adapter parameters, or values for them, by name."""
Saved = tuple[Tensor | None, ...]
"""What a forward pass keeps for its backward pass."""
RowSquares = Callable[[Tensor, int, int], Tensor]
"""(w, row, col) -> (rows,), fp32: what the block w of W0 at (row, col) adds to its rows' n², besides rowsum(w²)."""
RowProducts = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""(w, row, col) -> (cross, squares), each (rows,) fp32: what the block w of W0 at (row, col) adds to its rows'
rowsum(W0⊙ΔW) and rowsum(ΔW²)."""
MergeRows = Callable[[Tensor, int], None]
"""(weight, start): make rows [start, start + len(weight)) of W0, fp32 (rows, in), the adapted weight's, in place."""

Kind = TypeVar("Kind", bound="type[Registered]")


class Initial(NamedTuple):
    """A parameter's shape and first values: U(−bound, bound), or `value` everywhere if `bound` is 0."""

    shape: tuple[int, ...]
    bound: float = 0.0
    value: float = 0.0


class Components(NamedTuple):
    """Names of the parameters that make up prunable components: component i is gates[i]·B[:, i]·A[:, i]ᵀ."""

    A: str
    B: str
    gates: str


class Needs(NamedTuple):
    """What backward is to return: gradients of the input and of its dropped copy; whether forward had such a copy."""

    x: bool
    dropped: bool
    had_dropped: bool


class Gradients(NamedTuple):
    """Of the input (tokens, in), of its dropped copy, and of the adapter's parameters by name."""

    x: Tensor | None
    dropped: Tensor | None
    parameters: dict[str, Tensor]


class Layer(Protocol):
    """What a method sees of its layer (`layer.AdaptedLinear` has it)."""

    bias: nn.Parameter | None
    base_norm: Tensor | None
    norm: Tensor | None
    keeps_products: bool
    dem_weight: float

    @property
    def shape(self) -> Shape: ...

    def base_product(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def base_product_back(self, grad: Tensor) -> Tensor: ...

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of W0, fp32 (rows, in), not to be written to; as `base_product`, where W0 is whole."""
        ...

    def adapter_parameters(self) -> dict[str, nn.Parameter]: ...


class Method(ABC):
    """What an adapter section chooses: how a model is fine-tuned. Most are an `AdapterMethod`."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What people call it."""

    @property
    def components(self) -> Components | None:
        """The parameters that importance-based pruning works on; None where nothing can be pruned."""
        return None

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain JSON, for manifests and for people."""

    def trained(self, model: nn.Module, target_modules: Sequence[str] | None, *, apart: Sequence[str]) -> list[str]:
        """The model's own parameters, by name, that are trained as they are; of `apart` as `inject.by_pattern` says.

        Raises UserError for a pattern that names nothing.
        """
        return []


class AdapterMethod(Method):
    """One way of adapting a linear layer: an update ΔW, with or without a magnitude over W0 + ΔW."""

    weight_decomposed: ClassVar[bool]
    """Whether the function has the row norms n of W0 + ΔW in it: such layers need a norm refresher."""
    magnitude: ClassVar[str | None] = None
    """The parameter δ (out,) of a trained magnitude m = ‖W0‖ + δ; None where a row's magnitude is its norm."""

    @property
    @abstractmethod
    def r(self) -> int:
        """Components of a layer's update: the adapter rank; 0 without an update."""

    @property
    @abstractmethod
    def lora_alpha(self) -> float:
        """What PEFT divides by r to scale the update."""

    @property
    @abstractmethod
    def scaling(self) -> float:
        """s, dimensionless: what multiplies the update; 0 without one."""

    @property
    def use_rslora(self) -> bool:
        """Whether s was given as lora_alpha / sqrt(r), which PEFT's folders then say too."""
        return False

    @property
    @abstractmethod
    def dropout(self) -> float:
        """Probability of dropping an input of the adapter."""

    def for_model(self, shapes: Collection[Shape]) -> Self:
        """This method for the layers of one model that it adapts, given the shapes of all of them.

        It is asked before a layer is made. A method whose layers share tensors returns one that holds them, in a field
        that takes no part in comparisons: those are what a method has besides its settings.
        """
        return self

    def shared_digest(self) -> str:
        """A short text that differs where what its layers share does; "" where they share nothing."""
        return ""

    def largest_useful_r(self, shape: Shape) -> int | None:
        """The r above which a layer of `shape` has no more functions to choose from; None where there is none."""
        return None

    @abstractmethod
    def function_settings(self) -> dict[str, Any]:
        """Those of `settings` that, with the parameters' values, say what a layer computes once it is trained."""

    @abstractmethod
    def parameters(self, shape: Shape) -> dict[str, Initial]:
        """The trained parameters of a layer of `shape`, in the order of registration; they change no output yet."""

    @abstractmethod
    def forward(self, layer: Layer, x_ti: Tensor, dropped_ti: Tensor | None) -> tuple[Tensor, Saved]:
        """The output (tokens, out), and what backward needs. `dropped_ti` is x after dropout, None without dropout."""

    @abstractmethod
    def backward(self, layer: Layer, saved: Saved, grad_to: Tensor, *, needs: Needs) -> Gradients:
        """All gradients, given that of the output (tokens, out)."""

    @abstractmethod
    def norm_parameters(self, shape: Shape) -> Sequence[str]:
        """Names of the parameters that the row norms depend on."""

    @abstractmethod
    def row_products(self, shape: Shape, parameters: Tensors) -> RowProducts | None:
        """The rows' products of W0 and ΔW and of ΔW with itself, block by block; None where ΔW = 0."""

    def row_squares(self, shape: Shape, parameters: Tensors) -> RowSquares | None:
        """How n² differs from rowsum(W0²), block by block: 2·cross + squares; None where it does not.

        A method that has this sum with less work than its two parts overrides it.
        """
        products = self.row_products(shape, parameters)
        if products is None:
            return None

        def share(w: Tensor, row: int, col: int) -> Tensor:
            cross, squares = products(w, row, col)
            return squares.add(cross, alpha=2)

        return share

    @abstractmethod
    def merger(self, shape: Shape, values: Tensors) -> MergeRows:
        """What merges any rows of a layer of `shape`, given its whole fp32 parameters."""

    @property
    @abstractmethod
    def in_peft(self) -> bool:
        """Whether its adapters are saved in PEFT's format; else in our own (`native_format.py`)."""

    @property
    def expressible_in_peft(self) -> bool:
        """Whether PEFT can compute the same function, at whatever size (`to_peft`)."""
        return self.in_peft

    @abstractmethod
    def to_peft(self, shape: Shape, values: Tensors, base_norm: Tensor | None) -> AdapterLayer | None:
        """PEFT's form of whole fp32 `values` on the CPU; None where there is nothing to write."""

    @abstractmethod
    def from_peft(self, theirs: AdapterLayer, base_norm: Tensor | None) -> dict[str, Tensor]:
        """Values of the parameters that give the function of `theirs`, which does not differ (`differences`)."""

    @abstractmethod
    def differences(self, theirs: AdapterLayer) -> Iterator[str]:
        """Why a PEFT module cannot be the start of this method, each with a remedy."""

    @abstractmethod
    def resized(self, r: int) -> "AdapterMethod | None":
        """The method of a layer whose other components are pruned away; None if nothing is left to train."""

    @abstractmethod
    def magnitude_only(self) -> "AdapterMethod":
        """This method without its update of the weight. Raises ValueError where nothing would be left to train."""


class Registered(Protocol):
    """A class of methods that a configuration can name."""

    name: ClassVar[str]

    @classmethod
    def from_config(cls, adapter: AdapterConfig) -> Method:
        """The method with the section's settings. Raises UserError for one that means nothing to it."""
        ...


_METHODS: dict[str, type[Registered]] = {}


def register(method: Kind) -> Kind:
    """Make a method known under its `name` (adapter.method in configurations); for use as a class decorator."""
    if _METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"there is a method {method.name!r} already: {_METHODS[method.name]}")
    return method


def registered() -> Mapping[str, type[Registered]]:
    """Every method by name; those of the package once `dora_dist.adapters.methods` is imported."""
    return _METHODS
