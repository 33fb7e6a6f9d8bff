"""Factored row norms, and when they are refreshed, on whole weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.methods import LowRank, WeightDecomposed
from dora_dist.adapters.norms import (
    NormRefresher,
    add_base_squares,
    add_update_sums,
)
from dora_dist.adapters.pieces import WeightPiece, rectangles


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 7),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    limit=st.integers(1, 30),
)
def test_rectangles_tile_any_range_once(rows: int, columns: int, cut: tuple[float, float], limit: int) -> None:
    start, stop = sorted(round(c * rows * columns) for c in cut)
    matrix = torch.arange(rows * columns).view(rows, columns)
    found: list[int] = []
    for block in rectangles(start, stop, columns, limit):
        piece = matrix[block.row : block.row + block.rows, block.col : block.col + block.cols]
        assert block.offset == len(found)
        assert block.rows == 1 or block.rows * block.cols <= limit
        found += piece.flatten().tolist()
    assert found == list(range(start, stop))


def exact_norm(layer: AdaptedLinear) -> torch.Tensor:
    return (layer.weight.double() + layer.method.scaling * layer.lora_B.double() @ layer.lora_A.double().T).norm(dim=1)


def layer_of(out_features: int, in_features: int, r: int = 3) -> AdaptedLinear:
    torch.manual_seed(out_features)
    layer = AdaptedLinear.from_linear(
        nn.Linear(in_features, out_features, bias=False), WeightDecomposed(LowRank(r, 5.0))
    )
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(5, 7), (1, 2), (13, 3), (64, 129)])
def test_partial_sums_of_any_pieces_add_up_to_the_norm(shape: tuple[int, int], world_size: int) -> None:
    layer = layer_of(*shape)
    flat = layer.weight.detach().flatten()
    sums = torch.zeros(shape[0])
    for start in range(0, flat.numel(), -(-flat.numel() // world_size)):
        piece = WeightPiece([flat[start : start + -(-flat.numel() // world_size)]], start)
        add_base_squares(layer, piece, sums)
        add_update_sums(layer, piece, change=sums)
    assert torch.allclose(sums.sqrt().double(), exact_norm(layer), rtol=1e-6, atol=0)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layer_of(11, 6), layer_of(6, 11)

    def forward(self, x: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        if recompute:
            return self.second(checkpoint(self.first, x, use_reentrant=False))
        return self.second(self.first(x))


def assert_fresh(model: TwoLayers) -> None:
    for layer in (model.first, model.second):
        assert torch.allclose(layer.norm.double(), exact_norm(layer), rtol=1e-6, atol=0)


def test_one_refresh_per_optimizer_step_and_never_a_stale_norm() -> None:
    model = TwoLayers()
    norms = NormRefresher(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(1, 4):
        for _ in range(3):  # accumulation, each with a recomputed forward
            model(torch.randn(4, 6), recompute=True).square().sum().backward()
            assert_fresh(model)
        model(torch.randn(4, 6))  # evaluation between steps
        assert norms.refreshes == step
        optimizer.step()
        optimizer.zero_grad()
    model(torch.randn(4, 6))
    assert_fresh(model)
    assert norms.refreshes == 4


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.body = nn.Linear(6, 6), TwoLayers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.before(x))


@pytest.mark.parametrize("inner", ["body", "body.second"])
def test_an_inner_module_called_after_a_step_has_fresh_norms(inner: str) -> None:
    model = Nested()
    norms = NormRefresher(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    module = model.get_submodule(inner)
    module(torch.randn(4, 11 if inner.endswith("second") else 6))
    assert_fresh(model.body)
    model(torch.randn(4, 6))
    assert norms.refreshes == 2


def test_parameters_written_by_hand_need_and_get_mark_stale() -> None:
    model = TwoLayers()
    norms = NormRefresher(model)
    model(torch.randn(4, 6))
    with torch.no_grad():
        model.first.lora_B.mul_(2)
    norms.mark_stale()
    model(torch.randn(4, 6))
    assert_fresh(model)


def test_a_closed_refresher_no_longer_listens() -> None:
    model = TwoLayers()
    norms = NormRefresher(model)
    model(torch.randn(4, 6))
    norms.close()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model(torch.randn(4, 6))
    assert norms.refreshes == 1
