"""Packed weights in one process: any range of them, both products, row norms, merging, and who may use a name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dora_dist.adapters.inject import by_pattern, inject, weight_count
from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.methods import LowRank, WeightDecomposed
from dora_dist.adapters.norms import NormRefresher
from dora_dist.adapters.storage import PLAIN, WeightStorage, as_held, packed, register, storage_of
from dora_dist.runtime.errors import UserError
from tests.storages import BLOCK, TwoTensors

SHAPE = (7, 13)  # 91 numbers: the last of ten blocks is cut


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(SHAPE[1], SHAPE[0])


def layer_of(storage: WeightStorage, source: nn.Linear) -> AdaptedLinear:
    layer = AdaptedLinear.from_linear(source, WeightDecomposed(LowRank(3, 5.0)), storage)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def decoded(source: nn.Linear) -> Tensor:
    """The weight (out, in) as the storage has it, block by block from its definition."""
    flat = source.weight.detach().flatten()
    blocks = []
    for block in flat.split(BLOCK):
        scale = block.abs().max() / 7
        blocks.append((block / scale).round() * scale)
    return torch.cat(blocks).view(SHAPE)


def test_a_layer_holds_the_records_and_not_the_weight() -> None:
    source = linear()
    layer = layer_of(TwoTensors(), source)
    held = {
        name: (p.dtype, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters() if "weight" in name
    }
    assert held == {
        "weight": (torch.uint8, (50,), False),
        "weight_scale": (torch.float32, (10,), False),
    }
    assert layer.shape == SHAPE
    assert weight_count(layer) == 91 + 7 + 3 * (7 + 13) + 7  # weight and bias, both factors, magnitudes


def test_any_range_of_a_weight_can_be_read() -> None:
    source = linear()
    layer, expected = layer_of(TwoTensors(), source), decoded(source).flatten()
    for start in range(0, 92, 3):
        for stop in range(start, 92, 7):
            values = layer.storage.to_fp32(layer.held(), start, stop, device=torch.device("cpu"))
            torch.testing.assert_close(values, expected[start:stop])


@pytest.mark.parametrize("chunk", [2**20, 26])
def test_output_and_gradients_are_those_of_the_decoded_weight(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for at_once in (packed.PRODUCT_ELEMENTS, packed.SUM_ELEMENTS):
        monkeypatch.setitem(at_once, "cpu", chunk)
    source = linear()
    ours = layer_of(TwoTensors(), source)
    plain = linear()
    with torch.no_grad():
        plain.weight.copy_(decoded(source))
    theirs = layer_of(PLAIN, plain)
    results = []
    for layer in (ours, theirs):
        refresher = NormRefresher(layer)
        x = torch.linspace(-1, 1, 4 * SHAPE[1]).view(4, SHAPE[1]).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, layer.norm, *(p.grad for p in layer.adapter_parameters().values())])
        refresher.close()
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [0, 1, 13, 26, 65])
def test_rows_to_merge_are_what_the_layer_computes_with(start: int) -> None:
    source = linear()
    flat, asked = source.weight.detach().flatten(), []

    def read(first: int, last: int) -> Tensor:
        asked.append((first, last))
        return flat[first:last].clone()

    span = (start, min(start + 26, 91))
    torch.testing.assert_close(as_held(TwoTensors(), read, 91, span=span), decoded(source).flatten()[slice(*span)])
    assert asked[0][0] % BLOCK == 0 and asked[0][0] > start - BLOCK and asked[0][1] < span[1] + BLOCK
    asked.clear()
    assert torch.equal(as_held(PLAIN, read, 91, span=span), flat[slice(*span)]) and asked == [span]


def test_a_weight_that_somebody_else_has_quantised_is_not_packed_again() -> None:
    model = nn.Sequential(linear())
    model[0].weight = nn.Parameter(model[0].weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"'0' has a quantised weight \(int8\)"):
        inject(model, by_pattern(WeightDecomposed(LowRank(3, 5.0)), ["0"]), storage=TwoTensors())


def test_a_storage_is_found_by_its_name_alone() -> None:
    assert storage_of("plain") is PLAIN and storage_of("two_tensors").name == "two_tensors"
    with pytest.raises(
        UserError, match='model.storage = "int9": no such storage .known: plain, int8, nf4, two_tensors.*plugins'
    ):
        storage_of("int9")
    again: Callable[[], WeightStorage] = TwoTensors
    with pytest.raises(ValueError, match="'two_tensors' is registered already"):
        register(again())
