"""What holds for every registered method: a new one is tested here by being registered."""

import math
import sys
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dora_dist.adapters import methods
from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.method import AdapterMethod, register, registered
from dora_dist.adapters.methods import LowRank, Mora, WeightDecomposed
from dora_dist.adapters.norms import NormRefresher, add_base_squares, add_update_sums
from dora_dist.adapters.peft_layer import VeraLayer
from dora_dist.adapters.pieces import WeightPiece, rectangles
from dora_dist.adapters.recompute import keeping_products
from dora_dist.adapters.update import Update
from dora_dist.config import AdapterConfig
from dora_dist.runtime import plugins
from dora_dist.runtime.errors import UserError
from tests.conftest import ROOT
from tests.mora_by_formula import change
from tests.toy import relative_error

IN, OUT, R = 29, 41, 5
sys.path.append(str(ROOT / "examples"))
plugins.load(["add_a_method"])
REGISTERED = sorted(name for name, kind in registered().items() if issubclass(kind, Update))
NAMES = [*REGISTERED, "mora/1"]  # MoRA of type 1; 6 is its default


def update(name: str, **settings: Any) -> Update:
    name, _, variant = name.partition("/")
    kind: Any = registered()[name]
    made: Update = kind(r=R, **settings, **({"type": int(variant)} if variant else {}))
    return made.for_model([(OUT, IN + 7), (OUT + 3, IN)])


def random_layer(method: AdapterMethod, bias: bool = True) -> AdaptedLinear:
    """A layer whose parameters are all away from their first values, its norms computed."""
    torch.manual_seed(0)
    layer = AdaptedLinear.from_linear(nn.Linear(IN, OUT, bias=bias), method)
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    NormRefresher(layer).refresh()
    return layer


def merged(layer: AdaptedLinear, own: dict[str, Tensor], norm_gradient: str = "detached") -> Tensor:
    """(m / n)·(W0 + ΔW) of the parameters `own`, differentiable and in their dtype."""
    weight = layer.weight.to(next(iter(own.values())).dtype)
    whole = weight + delta(layer, own)
    if "magnitude_offset" not in own:
        return whole
    norm = whole.norm(dim=1)
    magnitude = weight.norm(dim=1) + own["magnitude_offset"]
    return (magnitude / (norm.detach() if norm_gradient == "detached" else norm))[:, None] * whole


def delta(layer: AdaptedLinear, own: dict[str, Tensor]) -> Tensor:
    """ΔW by PEFT's form, or by the formula where PEFT has none."""
    method = layer.method.update if isinstance(layer.method, WeightDecomposed) else layer.method
    if isinstance(method, Mora):
        return change(layer.shape, own["mora_M"], method.type)
    theirs = method.to_peft(layer.shape, {name: own[name] for name in method.parameters(layer.shape)}, None)
    assert theirs is not None
    if isinstance(theirs, VeraLayer):
        theirs = theirs.low_rank(IN)
    assert theirs.lora_A is not None and theirs.lora_B is not None
    return theirs.scaling * theirs.lora_B @ theirs.lora_A


@pytest.mark.parametrize("norm_gradient", [None, "detached", "full"], ids=["plain", "detached", "full"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients_are_those_of_the_merged_weight(name: str, bias: bool, norm_gradient: Any) -> None:
    method: AdapterMethod = update(name)
    if norm_gradient is not None:
        method = WeightDecomposed(update(name), norm_gradient=norm_gradient)
    layer = random_layer(method, bias)
    x = torch.randn(3, 7, IN, requires_grad=True)
    y = layer(x)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)

    own = {kind: p.detach().double().requires_grad_() for kind, p in layer.adapter_parameters().items()}
    exact_x = x.detach().double().requires_grad_()
    weight = merged(layer, own, norm_gradient or "detached")
    expected = F.linear(exact_x, weight, None if layer.bias is None else layer.bias.double())
    expected.backward(cotangent.double())
    assert relative_error(y, expected) <= 1e-5
    assert relative_error(x.grad, exact_x.grad) <= 1e-5
    for kind, parameter in layer.adapter_parameters().items():
        assert relative_error(parameter.grad, own[kind].grad) <= 1e-5, kind


@pytest.mark.parametrize("mode", [None, "exact", "adapter"])
@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_of_the_update_or_of_all_but_the_base_product(name: str, mode: Any) -> None:
    method: AdapterMethod = update(name, dropout=0.4)
    if mode is not None:
        method = WeightDecomposed(update(name, dropout=0.4), mode)
    layer = random_layer(method)
    x = torch.randn(7, IN, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)

    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.4).double()
    exact_x, w = x.detach().double().requires_grad_(), layer.weight.double()
    own = {kind: p.detach().double() for kind, p in layer.adapter_parameters().items()}
    whole, dropped = merged(layer, own), exact_x * mask
    if mode == "adapter":  # g·(W0·x + ΔW·xd)
        g = (whole / (w + delta(layer, own)))[:, :1]
        expected = exact_x @ (g * w).T + dropped @ (whole - g * w).T
    else:
        expected = exact_x @ w.T + dropped @ (whole - w).T
    expected = expected + layer.bias.double()
    expected.backward(cotangent.double())
    assert relative_error(y, expected) <= 1e-5
    assert relative_error(x.grad, exact_x.grad) <= 1e-5


@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "magnitude"])
@pytest.mark.parametrize("name", NAMES)
def test_products_kept_for_a_recomputation_are_right_and_hold_no_input(name: str, magnitude: bool) -> None:
    """Or inputs, which checkpointing is to throw away, would all wait for backward."""
    layer = random_layer(WeightDecomposed(update(name)) if magnitude else update(name))
    layer.keeps_products = True
    inputs: list[weakref.ref[Tensor]] = []
    layer.register_forward_pre_hook(lambda _, given: inputs.append(weakref.ref(given[0])))

    def segment(x: Tensor) -> Tensor:
        return layer(x.tanh()).tanh()

    x = torch.randn(3, 7, IN, requires_grad=True)
    own = [x, *layer.adapter_parameters().values()]
    expected = torch.autograd.grad(segment(x).square().sum(), own)
    y = checkpoint(segment, x, use_reentrant=False, context_fn=keeping_products)
    assert inputs[1]() is None
    found = torch.autograd.grad(y.square().sum(), own)
    assert len(inputs) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("pieces", [1, 3, 7])
@pytest.mark.parametrize("name", NAMES)
def test_row_norms_add_up_over_pieces_of_the_weight(name: str, pieces: int) -> None:
    layer = random_layer(WeightDecomposed(update(name)))
    flat = layer.weight.detach().flatten()
    sums, step = torch.zeros(OUT), -(-flat.numel() // pieces)
    for start in range(0, flat.numel(), step):
        piece = WeightPiece((flat[start : start + step],), start)
        add_base_squares(layer, piece, sums)
        add_update_sums(layer, piece, change=sums)
    own = {kind: p.detach().double() for kind, p in layer.adapter_parameters().items()}
    exact = (layer.weight.double() + delta(layer, own)).norm(dim=1)
    assert relative_error(sums.sqrt(), exact) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_products_of_the_base_and_the_update_add_up_over_pieces(name: str) -> None:
    layer = random_layer(WeightDecomposed(update(name)))
    products = layer.method.row_products(layer.shape, layer.adapter_parameters())
    assert products is not None
    found = torch.zeros(2, OUT)
    for block in rectangles(0, 100, IN), rectangles(100, OUT * IN, IN):  # cuts a row
        for row, rows, col, cols, _ in block:
            w = layer.weight.detach()[row : row + rows, col : col + cols]
            found[:, row : row + rows] += torch.stack(products(w, row, col))
    own = {kind: p.detach().double() for kind, p in layer.adapter_parameters().items()}
    weight, change = layer.weight.double(), delta(layer, own)
    scale = weight.norm(dim=1) * change.norm(dim=1)
    assert ((found[0] - (weight * change).sum(1)) / scale).abs().max() <= 1e-6
    assert relative_error(found[1], change.square().sum(1)) <= 1e-6


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_at_the_start_the_output_is_the_bases_and_gradients_are_of_the_parameters_dtype(
    name: str, dtype: torch.dtype, decomposed: bool
) -> None:
    linear = nn.Linear(IN, OUT, dtype=dtype)
    layer = AdaptedLinear.from_linear(linear, WeightDecomposed(update(name)) if decomposed else update(name))
    NormRefresher(layer)
    x = torch.randn(7, IN, dtype=dtype)
    y = layer(x)
    assert torch.equal(y, linear(x))
    y.square().sum().backward()
    found = {kind: p.grad for kind, p in layer.adapter_parameters().items()}
    assert all(grad is not None and grad.dtype == dtype for grad in found.values())
    assert any(grad.any() for grad in found.values() if grad is not None)


@pytest.mark.parametrize("name", REGISTERED)
def test_the_adapter_section_makes_the_method_with_and_without_a_magnitude(name: str) -> None:
    dynamic = update(name).components is not None
    section = AdapterConfig(method=name, r=6, dropout=0.1, dynamic_rank=dynamic, weight_decomposed=False)
    found = methods.chosen(section)
    assert type(found) is registered()[name]
    assert (found.r, found.dropout) == (section.start_rank, 0.1)
    over = methods.chosen(section.model_copy(update={"weight_decomposed": True, "norm_gradient": "full"}))
    assert isinstance(over, WeightDecomposed)
    assert (over.update, over.norm_gradient) == (found, "full")
    assert over.settings()["method"] == name
    assert (found.title, over.title) == registered()[name].titles
    assert over.magnitude_only().r == 0


@pytest.mark.parametrize("name", REGISTERED)
def test_without_a_rank_a_method_has_the_one_that_is_usual_for_it(name: str) -> None:
    kind: Any = registered()[name]
    if kind().components is None:
        assert AdapterConfig(method=name).r is None
        assert methods.chosen(AdapterConfig(method=name)).settings()["r"] == kind().r
    assert {"vera": 256, "mora": 8, "loha": 8}.get(name, 16) == kind().r
    unnamed = AdapterConfig()
    assert unnamed.r == methods.chosen(unnamed).settings()["r"] == 16


@pytest.mark.parametrize("name", NAMES)
def test_above_the_largest_useful_rank_there_are_no_further_functions(name: str) -> None:
    made = WeightDecomposed(update(name))
    most = made.largest_useful_r((OUT, IN))
    assert most == {"lora": IN, "dynamic_rank": IN, "mora/1": 25, "mora": 26}.get(name)
    for kind, r in ((1, 25), (6, 26)):  # of a matrix that covers the whole weight, and of the next smaller one
        sizes = [Mora(r=n, type=kind).parameters((OUT, IN))["mora_M"].shape[0] for n in (r - 1, r)]
        assert sizes[0] < OUT <= sizes[1]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"method": "loka"}, 'adapter.method = "loka": there is no such method; name one of dynamic_rank, '),
        ({"method": "lora", "dynamic_rank": True}, "has no components to prune; set it to false"),
        ({"method": "dynamic_rank"}, "has components to prune; set it to true"),
        (
            {"settings": {"alpha": 1}},
            "adapter.settings: 'alpha' is not a setting of the method 'lora'; it has: none",
        ),
        ({"settings": {"r": 4}}, "adapter.settings: 'r' is not a setting of the method 'lora'"),
        (
            {"method": "mora", "settings": {"type": 3}},
            "adapter.settings: type = 3 is none of MoRA's; it has 1 (sharing)",
        ),
        ({"method": "mora", "settings": {"type": [6]}}, "adapter.settings: type = [6] is none of MoRA's"),
        ({"method": "mora", "settings": {"type": True}}, "adapter.settings: type = True is none of MoRA's"),
        ({"method": "mora", "settings": {"type": 6.0}}, "adapter.settings: type = 6.0 is none of MoRA's"),
        ({"method": "mora", "lora_alpha": 64}, "adapter.lora_alpha = 64: the method 'mora' does not scale its update"),
        ({"method": "vera", "lora_alpha": 8.5}, "adapter.lora_alpha = 8.5: the method 'vera' does not scale"),
        ({"method": "mora", "dynamic_rank": True}, "the method 'mora' has no components to prune; set it to false"),
        ({"method": "vera", "dynamic_rank": True}, "the method 'vera' has no components to prune; set it to false"),
        ({"method": "full", "r": 8}, 'adapter.r = 8: has no meaning for adapter.method = "full"'),
        ({"method": "full", "dropout": 0.1}, "adapter.dropout = 0.1: has no meaning"),
        ({"method": "full", "settings": {"type": 6}}, 'adapter.settings = {"type": 6}: has no meaning'),
        ({"method": "full", "dynamic_rank": True}, "the method 'full' has no components to prune; set it to false"),
        ({"method": "full", "trained_modules": ["lm_head"]}, "trains the whole model where adapter.target_modules is"),
    ],
)
def test_a_section_that_says_no_method_is_refused(section: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        methods.chosen(AdapterConfig(**section))
    assert says in str(caught.value)


def test_a_name_stands_for_one_method() -> None:
    with pytest.raises(ValueError, match="there is a method 'lora' already"):
        register(type("Another", (LowRank,), {"name": "lora"}))
    assert registered()["lora"] is LowRank


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize("shape", [(41, 29), (17, 71), (36, 36), (60, 5), (3, 2), (1, 40)])
def test_mora_fills_any_shape_as_its_definition_says(shape: tuple[int, int], kind: int) -> None:
    """More outputs than inputs and fewer, groups that fit, a matrix that is larger than the weight."""
    torch.manual_seed(0)
    method = Mora(r=2, type=kind)
    layer = AdaptedLinear.from_linear(nn.Linear(shape[1], shape[0], bias=False), method)
    size = len(layer.mora_M)
    assert size == max(1, math.isqrt(2 * sum(shape))) if kind == 1 else size % 2 == 0 < size
    with torch.no_grad():
        layer.mora_M.normal_()
    x = torch.randn(5, shape[1], requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    matrix, exact_x = layer.mora_M.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    expected = exact_x @ (layer.weight.double() + change(shape, matrix, kind)).T
    expected.square().sum().backward()
    assert relative_error(y, expected) <= 1e-5
    assert relative_error(x.grad, exact_x.grad) <= 1e-5
    assert relative_error(layer.mora_M.grad, matrix.grad) <= 1e-5
    rows, merge = torch.zeros(shape), method.merger(shape, {"mora_M": layer.mora_M.detach()})
    for start in range(0, shape[0], 5):  # as a merge reads the base
        merge(rows[start : start + 5], start)
    assert relative_error(rows, change(shape, matrix, kind)) <= 1e-6


class Operations(TorchDispatchMode):
    """Counts what a device is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [1, 6])
def test_a_pass_through_mora_starts_as_many_operations_whatever_the_number_of_groups(kind: int) -> None:
    counts = []
    for width in (33, 201):  # 3 groups and 8
        layer = AdaptedLinear.from_linear(nn.Linear(width, width), Mora(r=2, type=kind))
        x = torch.ones(4, width, requires_grad=True)
        layer(x).sum().backward()  # makes the table of angles
        with Operations() as operations:
            layer(x).sum().backward()
        counts.append(operations.count)
    assert counts[0] == counts[1]
