"""Which modules of a model become AdaptedLinear."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from dora_dist.adapters.adapter_folder import SavedAdapter
from dora_dist.adapters.held import held_layers, held_linear
from dora_dist.adapters.layer import AdaptedLinear, adapted_layers
from dora_dist.adapters.method import AdapterMethod
from dora_dist.adapters.methods import for_one_model
from dora_dist.adapters.patterns import inside, kinds_of, matches, matching, names_of_each, parts_in
from dora_dist.adapters.storage import PLAIN, WeightStorage
from dora_dist.runtime.errors import UserError
from dora_dist.weights.loading import HeldWeight, initial_values
from dora_dist.weights.placement import Fill

AdapterPlan = Callable[[nn.Module], dict[str, AdapterMethod]]
"""Given a model, the adapter of each linear layer that gets one, by module name."""


Packed = Callable[[nn.Module], Collection[str]]
"""Given a model, the linear layers whose weight a storage may hold, by module name."""


def packable(model: nn.Module, *, apart: Sequence[str] = ()) -> list[str]:
    """The linear layers whose weight a packed storage holds while it is frozen, by name: those of the numbered layers.

    Embeddings, norms and heads stay plain, and so do the parts of the model that are `apart` (a vision tower), weights
    that several modules share, and subclasses of nn.Linear, which may do other things with their weight.
    """
    shared = {name for names in names_of_each(model) if len(names) > 1 for name in names}
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module.weight.is_floating_point()
        and any(step.isdigit() for step in name.split("."))
        and not parts_in(name, apart)
        and f"{name}.weight" not in shared
    ]


def hold_frozen(model: nn.Module) -> None:
    """Make frozen linear layers of the numbered layers, which nothing has packed or adapted, HeldLinear, in place.

    A bias that trains goes on training.
    """
    for name in packable(model):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if not linear.weight.requires_grad:
            parent, _, child = name.rpartition(".")
            trains = linear.bias is not None and linear.bias.requires_grad
            held = held_linear(linear, PLAIN)
            if held.bias is not None:
                held.bias.requires_grad_(trains)
            setattr(model.get_submodule(parent), child, held)


def by_pattern(
    method: AdapterMethod,
    target_modules: Sequence[str],
    magnitude_only: Sequence[str] = (),
    *,
    apart: Sequence[str] = (),
) -> AdapterPlan:
    """Plan `method` for every nn.Linear that a pattern names.

    A pattern is a module's full name, a suffix of it that starts at a dot ("q_proj", "mlp.up_proj"), or a regular
    expression that matches the full name. `magnitude_only` modules get a magnitude and no low-rank factors. `apart`
    are parts of the model that a suffix does not reach: a pattern has to name them. The plan raises UserError if a
    pattern matches nothing, or if both lists match one module.
    """

    def plan(model: nn.Module) -> dict[str, AdapterMethod]:
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        others = {name: type(m).__name__ for name, m in model.named_modules() if name and name not in linears}
        low_rank = _match_all(target_modules, linears, others, "adapter.target_modules", apart=apart)
        magnitudes = _match_all(magnitude_only, linears, others, "adapter.magnitude_only_modules", apart=apart)
        if both := sorted(low_rank & magnitudes):
            raise UserError(
                f"adapter.magnitude_only_modules and adapter.target_modules both match {both[0]!r}; "
                "take it out of one of the two"
            )
        kinds = dict.fromkeys(low_rank, method)
        if magnitudes:
            kinds |= dict.fromkeys(magnitudes, method.magnitude_only())
        _refuse_absurd_rank(method, model, low_rank)
        return {name: kinds[name] for name in linears if name in kinds}

    return plan


def with_ranks(plan: AdapterPlan, ranks: Mapping[str, int]) -> AdapterPlan:
    """`plan` for a model whose pruned components are gone: gated layers have `ranks` components, or none if absent.

    A gated layer without components keeps its magnitude if it has one, else it is not adapted any more.
    """

    def resized(model: nn.Module) -> dict[str, AdapterMethod]:
        methods = {}
        for name, method in plan(model).items():
            left = method.resized(ranks.get(name, 0)) if method.components else method
            if left is not None:
                methods[name] = left
        return methods

    return resized


def like(adapter: SavedAdapter) -> AdapterPlan:
    """Plan the layers that a saved adapter has, each with its own method, rank and scaling."""
    methods = adapter.methods()
    return lambda model: dict(methods)


def inject(
    model: nn.Module,
    plan: AdapterPlan,
    trained_modules: Sequence[str] = (),
    *,
    trained_parameters: Sequence[str] = (),
    storage: WeightStorage = PLAIN,
    packed: Packed | None = None,
) -> list[str]:
    """Replace planned nn.Linear modules by AdaptedLinear over the SAME parameters, in place; freeze all else.

    A `storage` other than the plain one has parameters of its own instead of the weight, which it encodes: it holds
    what is `packed` (`packable` unless something else is said), adapted or not, as HeldLinear.

    All but what is in `trained_modules` (names, see `trained_in_full`), and `trained_parameters` (names): these are
    trained as they are. A parameter that several modules share is trained in all of them; a module that shares one is
    refused. Adapters of a model that has its weights start as the paper says, from torch's random numbers, and change
    no output. Returns the names of the adapted modules. Raises UserError if a planned module is not a linear layer of
    the model, is quantised, or lies in a trained module, if its weight is among the trained parameters, or if its
    weight is shared with another module: adapting a tied weight in one place would silently change, or not change, the
    other.
    """
    methods = plan(model)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if strangers := [name for name in methods if name not in linears]:
        raise UserError(f"the adapter has a module {strangers[0]!r} that this model does not have: another base?")
    _refuse_shared(model, {name: f"{name}.weight" for name in methods}, "adapted", "target_modules")
    _refuse_inner(methods, trained_modules)
    _refuse_adapted(methods, trained_parameters)
    if quantised := [name for name in methods if not linears[name].weight.is_floating_point()]:
        kind = str(linears[quantised[0]].weight.dtype).removeprefix("torch.")
        raise UserError(
            f"{quantised[0]!r} has a quantised weight ({kind}), which cannot be adapted; load the model as it was "
            "before quantisation"
        )
    holds = set() if storage is PLAIN else set((packed or packable)(model))
    if missing := sorted(holds - linears.keys()):
        raise UserError(
            f"the adapter was trained with a packed weight of {missing[0]!r}, which is no linear layer of this model: "
            "another base?"
        )
    model.requires_grad_(False)
    for name in trained_modules:
        module = model.get_submodule(name).requires_grad_(True)
        own = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        _refuse_shared(model, {n: n for n in own}, "trained", "trained_modules", name)
    shapes = {name: (linears[name].out_features, linears[name].in_features) for name in methods}
    for name, method in for_one_model(methods, shapes).items():
        parent, _, child = name.rpartition(".")
        linear = linears[name]
        held_by = storage if name in holds else PLAIN
        setattr(model.get_submodule(parent), child, AdaptedLinear.from_linear(linear, method, held_by))
    for name in sorted(holds - methods.keys()):
        if not linears[name].weight.requires_grad and f"{name}.weight" not in trained_parameters:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, held_linear(linears[name], storage))
    for name in trained_parameters:
        model.get_parameter(name).requires_grad_(True)
    return list(methods)


def initial_fills(model: nn.Module, seed: int) -> dict[str, Fill]:
    """The values that each adapter parameter of `model` starts with, by its name: a function of `seed` and name."""
    fills = {}
    for layer_name, layer in adapted_layers(model).items():
        for kind, (shape, bound, value) in layer.method.parameters(layer.shape).items():
            name = f"{layer_name}.{kind}"
            fills[name] = initial_values(name, torch.Size(shape), seed, bound, value=value)
    return fills


def held_weights(model: nn.Module) -> dict[str, HeldWeight]:
    """The frozen weight of each layer of `model` that is adapted or that a storage holds, by its name in the base."""
    found = {}
    for name, layer in held_layers(model).items():
        storage, shape = layer.storage, torch.Size(layer.shape)
        parameters = {f"{name}.{kind}": stored.dtype for kind, stored in storage.tensors.items()}
        records = -(-shape.numel() // storage.record)
        found[f"{name}.weight"] = HeldWeight(shape, parameters, records, storage.encode_from)
    return found


def weight_count(model: nn.Module) -> int:
    """Numbers in a model that is not sharded, whatever holds them: a packed weight counts as what it stands for."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for layer in held_layers(model).values():
        count += layer.out_features * layer.in_features - sum(parameter.numel() for parameter in layer.held())
    return count


ABSURD_RANK = 64
"""Times a layer's longer side: such an adapter is larger than the layer by far. Less is a waste, which is warned of."""


def _refuse_absurd_rank(method: AdapterMethod, model: nn.Module, names: Iterable[str]) -> None:
    """Raise UserError, before memory is asked for, if a layer has far fewer rows and columns than components."""
    for name in sorted(names):
        out_features, in_features = model.get_parameter(f"{name}.weight").shape
        if method.r > ABSURD_RANK * max(out_features, in_features):
            most = method.largest_useful_r((out_features, in_features))
            why = "that is larger than the layer by far" if most is None else f"more than {most} add nothing"
            raise UserError(
                f"adapter.r: {method.r:,} components for {name!r}, which is ({out_features}, {in_features}); {why}: "
                "lower it"
            )


def _match_all(
    patterns: Sequence[str], linears: Sequence[str], others: Mapping[str, str], field: str, *, apart: Sequence[str]
) -> set[str]:
    """The names in `linears` that any pattern matches; `others` are the kinds of all other modules, by name."""

    def otherwise(pattern: str) -> str:
        named = next((name for name in others if matches(pattern, name, field, apart=apart)), None)
        found = "" if named is None else f", only {named!r} ({others[named]})"
        instead = f"{found}; adapter.trained_modules trains such a module in full" if found else ""
        return f"matches no linear layer of this model{instead}; it has: {kinds_of(linears)}"

    return matching(patterns, linears, field, apart=apart, otherwise=otherwise)


def _refuse_inner(adapted: Iterable[str], trained: Sequence[str]) -> None:
    for name in adapted:
        if any(name == outer or inside(name, outer) for outer in trained):
            raise UserError(
                f"adapter.target_modules and adapter.trained_modules both match {name!r}; take it out of one of the two"
            )


def _refuse_adapted(adapted: Iterable[str], trained: Sequence[str]) -> None:
    if both := sorted({f"{name}.weight" for name in adapted}.intersection(trained)):
        raise UserError(
            f"adapter.trained_parameters: {both[0]!r} is the weight of a layer that adapter.target_modules adapts, "
            "which stays frozen under the adapter; take it out of one of the two"
        )


def _refuse_shared(
    model: nn.Module, weights: Mapping[str, str], done: str, field: str, within: str | None = None
) -> None:
    """Raise UserError if one of `weights` (parameters' names, by their names in messages) has another name outside of
    `within`.
    """
    names = {name: every for every in names_of_each(model) for name in every}
    for called, name in weights.items():
        others = [n for n in names[name] if n != name and not (within and inside(n, within))]
        if others:
            raise UserError(
                f"adapter.{field}: {called!r} shares its weight with {', '.join(others)}; a tied weight cannot "
                f"be {done} in one place only: leave it out of {field}"
            )
