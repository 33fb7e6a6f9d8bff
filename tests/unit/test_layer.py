"""AdaptedLinear against the paper's formula in fp64, and against PEFT."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.method import AdapterMethod
from dora_dist.adapters.methods import DynamicRank, LowRank, WeightDecomposed
from dora_dist.adapters.norms import NormRefresher
from dora_dist.adapters.recompute import keeping_products
from dora_dist.adapters.storage.plain import PlainStorage
from tests.toy import relative_error

IN, OUT, R, ALPHA = 37, 53, 5, 7.0


def formula(
    x: Tensor,
    dropped: Tensor,
    layer: AdaptedLinear,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gates: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """The plain definition, everything built: methods.md parts 1 to 3, in whatever dtype it is given."""
    w = layer.weight.to(x.dtype)
    b = b if gates is None else b @ gates.diag()
    s, method = layer.method.scaling, layer.method
    y = x @ w.T
    if offset is None:
        y = y + s * (dropped @ a @ b.T)
    else:
        norm = (w + s * b @ a.T).norm(dim=1)
        if method.norm_gradient == "detached":
            norm = norm.detach()
        g = (w.norm(dim=1) + offset) / norm
        scaled = dropped if method.dropout_mode == "exact" else x
        y = y + (g - 1) * (scaled @ w.T) + s * g * (dropped @ a @ b.T)
    return y if bias is None else y + bias


def random_layer(
    method: AdapterMethod, bias: bool, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (OUT, IN)
) -> AdaptedLinear:
    torch.manual_seed(0)
    layer = AdaptedLinear.from_linear(nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype), method)
    with torch.no_grad():
        for name, parameter in layer.adapter_parameters().items():
            if name != "lora_A":
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    NormRefresher(layer).refresh()
    return layer


@pytest.mark.parametrize(
    ("mode", "norm_gradient", "dropout", "bias", "weight_decomposed", "gated"),
    list(
        itertools.product(
            ["exact", "adapter"],
            ["detached", "full"],
            [0.0, 0.3],
            ["trained", "frozen", ""],
            [True, False],
            [True, False],
        )
    ),
)
def test_output_and_gradients_are_the_formulas(
    mode: str, norm_gradient: str, dropout: float, bias: str, weight_decomposed: bool, gated: bool
) -> None:
    update = (DynamicRank if gated else LowRank)(R, ALPHA, dropout=dropout)
    layer = random_layer(WeightDecomposed(update, mode, norm_gradient) if weight_decomposed else update, bool(bias))
    if bias == "trained":
        layer.bias.requires_grad_()
    x = torch.randn(3, 11, IN, requires_grad=True)
    torch.manual_seed(5)
    y = layer(x)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)

    torch.manual_seed(5)  # the same mask
    mask = F.dropout(torch.ones_like(x), dropout).double() if dropout else 1.0
    own = layer.adapter_parameters()
    leaves = [x, layer.bias, *(own.get(name) for name in ("lora_A", "lora_B", "lora_gates", "magnitude_offset"))]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    expected = formula(exact[0], exact[0] * mask, layer, *exact[1:])
    expected.backward(cotangent.double())

    assert relative_error(y, expected) <= 1e-5
    for leaf, reference in zip(leaves, exact, strict=True):
        if leaf is not None and reference is not None and leaf.requires_grad:
            assert relative_error(leaf.grad, reference.grad) <= 1e-5
    assert layer.weight.grad is None
    assert (layer.bias is not None and layer.bias.grad is not None) == (bias == "trained")


@pytest.mark.parametrize("bias", [True, False])
def test_magnitude_only_trains_a_scale_per_row(bias: bool) -> None:
    layer = random_layer(WeightDecomposed(), bias)
    x = torch.randn(4, IN, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    w = layer.weight.double()
    offset = layer.magnitude_offset.detach().double().requires_grad_()
    g = (w.norm(dim=1) + offset) / w.norm(dim=1)
    expected = g * (x.detach().double() @ w.T) + (layer.bias.double() if bias else 0)
    expected.sum().backward()
    assert set(layer.adapter_parameters()) == {"magnitude_offset"}
    assert relative_error(y, expected) <= 1e-5
    assert relative_error(layer.magnitude_offset.grad, offset.grad) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "method",
    [
        WeightDecomposed(LowRank(R, ALPHA)),
        WeightDecomposed(LowRank(R, ALPHA, dropout=0.5)),
        WeightDecomposed(),
        WeightDecomposed(DynamicRank(R, ALPHA)),
        DynamicRank(R, ALPHA),
    ],
)
def test_at_the_start_the_output_is_the_bases_bit_for_bit(
    dtype: torch.dtype, bias: bool, method: AdapterMethod
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer = AdaptedLinear.from_linear(linear, method)
    NormRefresher(layer)
    x = torch.randn(7, IN, dtype=dtype)
    assert torch.equal(layer(x), linear(x))


def test_zero_rows_keep_their_output_and_have_finite_gradients() -> None:
    linear = nn.Linear(IN, OUT, bias=False)
    with torch.no_grad():
        linear.weight[[0, 7]] = 0
    layer = AdaptedLinear.from_linear(linear, WeightDecomposed(LowRank(R, ALPHA)))
    NormRefresher(layer)
    layer(torch.randn(3, IN)).square().sum().backward()
    assert layer.method.magnitude_excess(layer)[[0, 7]].tolist() == [0, 0]  # g = 1
    assert layer.norm[[0, 7]].tolist() == [0, 0]
    for parameter in (layer.lora_A, layer.lora_B, layer.magnitude_offset):
        assert torch.isfinite(parameter.grad).all()


def test_the_magnitude_is_not_rounded_to_bf16() -> None:
    """g = 1.0137 is 1.015625 in bf16, which would be a bias of every row; g − 1 is precise."""
    layer = random_layer(WeightDecomposed(LowRank(R, ALPHA)), bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.lora_B.zero_()
        layer.magnitude_offset.copy_(0.0137 * layer.base_norm)
    layer.norm = layer.base_norm
    x = torch.randn(4096, IN, dtype=torch.bfloat16)
    base = (x.double() @ layer.weight.double().T).abs().mean()
    ratio = (layer(x).double().abs().mean() / base).item()
    assert ratio == pytest.approx(1.0137, abs=5e-4)


def test_the_magnitude_moves_in_bf16_training() -> None:
    layer = AdaptedLinear.from_linear(nn.Linear(IN, OUT, dtype=torch.bfloat16), WeightDecomposed(LowRank(R, ALPHA)))
    NormRefresher(layer)
    before = layer.magnitude_offset.detach().clone()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-4)
    layer.weight.requires_grad_(False)
    for _ in range(3):
        layer(torch.randn(8, IN, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (layer.magnitude_offset != before).float().mean() > 0.9


def test_a_layer_without_norms_says_so() -> None:
    layer = AdaptedLinear.from_linear(nn.Linear(IN, OUT), WeightDecomposed(LowRank(R, ALPHA)))
    with pytest.raises(RuntimeError, match="NormRefresher"):
        layer(torch.randn(2, IN))


def test_norms_stay_fp32_when_the_module_changes_dtype() -> None:
    layer = random_layer(WeightDecomposed(LowRank(R, ALPHA)), bias=True).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.norm.dtype == layer.base_norm.dtype == torch.float32


@pytest.mark.parametrize("weight_decomposed", [True, False])
def test_twenty_steps_follow_peft(weight_decomposed: bool) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.up(x)))

    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    config = LoraConfig(r=R, lora_alpha=ALPHA, use_dora=weight_decomposed, target_modules=["up", "down"])
    peft_model = get_peft_model(theirs, config)
    for name in ("up", "down"):
        update = LowRank(R, ALPHA)
        method = WeightDecomposed(update) if weight_decomposed else update
        layer = AdaptedLinear.from_linear(getattr(ours, name), method)
        with torch.no_grad():
            layer.lora_A.copy_(peft_model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.T)
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        setattr(ours, name, layer)
    NormRefresher(ours)

    x, target = torch.randn(16, IN), torch.randn(16, IN)
    losses: list[list[float]] = []
    for model in (ours, peft_model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        losses.append([])
        for _ in range(20):
            loss = F.mse_loss(model(x), target)
            losses[-1].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < 0.8 * losses[0][0]


class CountedStorage(PlainStorage):
    """Counts products with a weight."""

    def __init__(self) -> None:
        self.products = 0

    def project(self, *arguments: Any, **options: Any) -> Tensor:
        self.products += 1
        return super().project(*arguments, **options)


def gradients(layer: AdaptedLinear, loss: Tensor) -> list[Tensor]:
    loss.backward()
    found = [p.grad for p in layer.adapter_parameters().values() if p.grad is not None]
    layer.zero_grad()
    return found


def after(layer: AdaptedLinear, x: Tensor) -> Tensor:
    """What follows needs the layer's output in backward, so a recomputation has to have the right one."""
    return layer(x).tanh()


def checkpointed(layer: AdaptedLinear, x: Tensor, segment: Callable[..., Tensor] = after) -> Tensor:
    return checkpoint(segment, layer, x, use_reentrant=False, context_fn=keeping_products)


@pytest.mark.parametrize("gated", [False, True])
def test_a_recomputation_takes_the_kept_output(gated: bool) -> None:
    layer, storage = counted_layer(gated)
    x = torch.randn(5, 14, requires_grad=True)
    expected, expected_x = gradients(layer, after(layer, x).square().sum()), x.grad
    for keeps, products in ((True, 1), (False, 2)):
        layer.keeps_products, storage.products, x.grad = keeps, 0, None
        found = gradients(layer, checkpointed(layer, x).square().sum())
        assert storage.products == products
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(x.grad, expected_x)


def counted_layer(gated: bool = False) -> tuple[AdaptedLinear, CountedStorage]:
    update = DynamicRank(3, 6.0) if gated else LowRank(3, 6.0)
    layer, storage = random_layer(WeightDecomposed(update), bias=False, shape=(6, 14)), CountedStorage()
    layer.storage = storage
    return layer, storage


def test_only_its_own_output_stands_for_a_recomputation() -> None:
    """Not another batch's that waits for its backward, nor one whose backward never came."""
    layer = random_layer(WeightDecomposed(LowRank(3, 6.0)), bias=False, shape=(6, 14))
    one, two = torch.randn(2, 5, 14)
    expected = [gradients(layer, after(layer, x).square().sum()) for x in (one, two)]
    losses = [checkpointed(layer, x).square().sum() for x in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(gradients(layer, losses[1]), expected[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(layer, losses[0]), expected[0], strict=True))
    del losses
    checkpointed(layer, one)  # and no backward
    loss = checkpointed(layer, two).square().sum()
    layer(one)  # nor does a forward pass that is not a recomputation
    assert all(torch.equal(a, b) for a, b in zip(gradients(layer, loss), expected[1], strict=True))


def twice(layer: AdaptedLinear, x: Tensor) -> Tensor:
    return layer(x).tanh() * layer(2 * x).tanh()


def without_and_with_gradients(layer: AdaptedLinear, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = layer(3 * x).mean()
    return scale * layer(x).tanh()


def nested(layer: AdaptedLinear, x: Tensor) -> Tensor:
    return layer(x).tanh() * checkpointed(layer, 2 * x)


def written_to(layer: AdaptedLinear, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = layer(x).mul_(2.0)
    return scale * layer(x).tanh()


def same_gradients(layer: AdaptedLinear, found: Tensor, expected: Tensor) -> None:
    pairs = zip(gradients(layer, found), gradients(layer, expected), strict=True)
    assert all(relative_error(a, b) < 1e-6 for a, b in pairs)


@pytest.mark.parametrize(
    ("segment", "recomputed"), [(after, 0), (twice, 0), (without_and_with_gradients, 0), (nested, 1)]
)
def test_kept_outputs_give_the_gradients_of_no_checkpointing(segment: Callable[..., Tensor], recomputed: int) -> None:
    layer, storage = counted_layer()
    x = torch.randn(5, 14, requires_grad=True)
    expected = segment(layer, x).square().sum()
    plain, storage.products = storage.products, 0
    found = checkpointed(layer, x, segment).square().sum()
    same_gradients(layer, found, expected)
    assert storage.products == plain + recomputed  # an inner checkpoint's forward, once more in the outer's


def test_an_output_that_is_written_to_in_place_is_computed_again() -> None:
    layer = random_layer(LowRank(3, 6.0), bias=False, shape=(6, 14))
    x = torch.randn(5, 14, requires_grad=True)
    found = checkpointed(layer, x, written_to).square().sum()
    same_gradients(layer, found, written_to(layer, x).square().sum())


class Random(nn.Module):
    """Between layers, as dropout is: a recomputation has to draw the forward's numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.tanh(), 0.2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "method",
    [
        LowRank(3, 6.0),
        LowRank(3, 6.0, dropout=0.3),
        WeightDecomposed(),
        WeightDecomposed(LowRank(3, 6.0), norm_gradient="full"),
        WeightDecomposed(LowRank(3, 6.0, dropout=0.3)),
        WeightDecomposed(LowRank(3, 6.0, dropout=0.3), dropout_mode="adapter"),
        WeightDecomposed(DynamicRank(3, 6.0)),
    ],
)
def test_a_recomputation_with_kept_products_needs_no_parameter(method: AdapterMethod, bias: bool) -> None:
    """So an engine that gathers a module's parameters before its forward has nothing to gather."""
    layers = [random_layer(method, bias, shape=shape) for shape in ((14, 14), (6, 14))]
    stack = nn.Sequential(layers[0], Random(), layers[1])
    x = torch.randn(5, 14, requires_grad=True)
    torch.manual_seed(1)
    expected = torch.autograd.grad(stack(x).square().sum(), [x, *adapters(layers)])

    for layer in layers:
        layer.keeps_products = True
    torch.manual_seed(1)
    y = checkpoint(stack, x, use_reentrant=False, context_fn=keeping_products)
    calls = [layer.register_forward_pre_hook(refuse) for layer in layers]
    found = torch.autograd.grad(y.square().sum(), [x, *adapters(layers)])
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def adapters(layers: list[AdaptedLinear]) -> list[Tensor]:
    return [p for layer in layers for p in layer.adapter_parameters().values()]


def refuse(*_: object) -> None:
    raise AssertionError("a module's forward hooks ran in a recomputation")


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another graph"])
@pytest.mark.parametrize("segment", [after, twice, without_and_with_gradients])
def test_reentrant_checkpointing_recomputes_and_is_right(segment: Callable[..., Tensor], beside: bool) -> None:
    layer = random_layer(WeightDecomposed(LowRank(3, 6.0)), bias=False, shape=(6, 14))
    x = torch.randn(5, 14, requires_grad=True)
    expected = gradients(layer, segment(layer, x).square().sum())  # its graph is gone before the other one is there
    unrelated = layer(5 * x) if beside else None
    found = gradients(layer, checkpoint(segment, layer, x, use_reentrant=True).square().sum())
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))
    del unrelated


def test_a_retained_graph_is_recomputed_as_often_as_it_is_used() -> None:
    layer, _ = counted_layer()
    x = torch.randn(5, 14, requires_grad=True)
    loss = checkpointed(layer, x, twice).square().sum()
    for retained in (True, False):
        loss.backward(retain_graph=retained)
    found = [p.grad.clone() for p in layer.adapter_parameters().values()]
    layer.zero_grad()
    for a, b in zip(found, gradients(layer, twice(layer, x).square().sum()), strict=True):
        assert relative_error(a, 2 * b) < 1e-6
