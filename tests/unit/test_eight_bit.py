"""Moments in 8 bits against bitsandbytes' own: read in any range, cleared, written."""

import sys
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.distributed as dist
from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor, nn

from dora_dist.config import EngineConfig, TrainingConfig
from dora_dist.runtime.errors import UserError
from dora_dist.training import optimizers
from dora_dist.zero3 import eight_bit
from dora_dist.zero3.state_names import MOMENTS

LENGTH = 5000  # the last block is not full


def stepped(length: int, steps: int = 3) -> tuple[Any, nn.Parameter, dict[str, Tensor]]:
    """bitsandbytes' optimizer after some steps, its shard, and both moments as bitsandbytes decodes them."""
    generator = torch.Generator().manual_seed(0)
    flat = nn.Parameter(torch.zeros(length))
    optimizer = bitsandbytes.optim.AdamW8bit([flat], lr=0.01, betas=(0.9, 0.99))
    for _ in range(steps):
        flat.grad = torch.randn(length, generator=generator) * torch.logspace(-4, 0, length)
        optimizer.step()
    state = optimizer.state[flat]
    if state["state1"].dtype is torch.float32:
        return optimizer, flat, {"exp_avg": state["state1"], "exp_avg_sq": state["state2"]}
    decoded = {
        key: dequantize_blockwise(state[f"state{n}"], absmax=state[f"absmax{n}"], code=state[f"qmap{n}"], blocksize=256)
        for n, key in enumerate(MOMENTS, start=1)
    }
    return optimizer, flat, decoded


@pytest.mark.parametrize("length", [LENGTH, 1000])
def test_any_range_is_read_as_bitsandbytes_decodes_it(length: int) -> None:
    optimizer, flat, moments = stepped(length)
    assert eight_bit.holds_codes(optimizer)
    for key, whole in moments.items():
        assert whole.any()
        for start, stop in ((0, length), (3, 250), (255, 257), (512, 768), (700, 700), (length - 1, length)):
            held = eight_bit.moment(optimizer.state[flat], key, start, stop)
            assert held is not None and torch.equal(held, whole[start:stop])
    assert eight_bit.moment({}, "exp_avg", 0, 10) is None


@pytest.mark.parametrize("length", [LENGTH, 1000])
def test_elements_are_cleared_and_their_neighbours_stay_to_the_last_bit(length: int) -> None:
    optimizer, flat, moments = stepped(length)
    where = torch.zeros(300, dtype=torch.bool)
    where[::7] = True
    for key, whole in moments.items():
        eight_bit.clear(optimizer.state[flat], key, 200, where)
        expected = whole.clone()
        expected[200:500][where] = 0.0
        held = eight_bit.moment(optimizer.state[flat], key, 0, length)
        assert held is not None and torch.equal(held, expected)


def test_moments_of_torchs_adamw_are_read_and_cleared_in_place() -> None:
    flat = nn.Parameter(torch.zeros(10))
    flat.grad = torch.arange(1.0, 11.0)
    optimizer = torch.optim.AdamW([flat])
    assert not eight_bit.holds_codes(optimizer)
    eight_bit.clear(optimizer.state[flat], "exp_avg", 0, torch.ones(10, dtype=torch.bool))  # nothing is there yet
    optimizer.step()
    state, before = optimizer.state[flat], optimizer.state[flat]["exp_avg"].clone()
    held = eight_bit.moment(state, "exp_avg", 2, 7)
    assert held is not None and held.data_ptr() == state["exp_avg"][2:].data_ptr() and len(held) == 5
    eight_bit.clear(state, "exp_avg", 2, torch.tensor([True, False, True]))
    assert state["exp_avg"].tolist() == [0.0 if n in (2, 4) else value for n, value in enumerate(before.tolist())]


@pytest.mark.parametrize("length", [LENGTH, 1000])
def test_moments_that_are_written_are_as_near_as_those_of_a_step(length: int) -> None:
    before, of, moments = stepped(length)
    fresh = bitsandbytes.optim.AdamW8bit([nn.Parameter(torch.zeros(1))], lr=0.01, betas=(0.9, 0.99))
    flat = nn.Parameter(of.detach().clone())
    fresh.param_groups[0]["params"] = []  # as DeepSpeed leaves it between steps
    eight_bit.encode(fresh, 0, flat, step=3, moments=moments)
    assert fresh.param_groups[0]["params"] == [] and fresh.state[flat]["step"] == 3
    for key, whole in moments.items():
        held = eight_bit.moment(fresh.state[flat], key, 0, length)
        assert held is not None
        assert (held - whole).norm() < 0.01 * whole.norm()
    fresh.param_groups[0]["params"] = [flat]
    flat.grad = of.grad = torch.randn(length, generator=torch.Generator().manual_seed(1))
    fresh.step()
    before.step()
    torch.testing.assert_close(flat, of, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize(("small", "pace"), [(slice(0, None, 2), (0.05, 0.5)), (slice(0, 2048), (0.98, 1.02))])
def test_small_gradients_keep_their_pace_in_blocks_of_their_own_alone(small: slice, pace: tuple[float, float]) -> None:
    """Against torch's AdamW: every second number of each block, and whole blocks (docs/decisions.md)."""
    scale = torch.ones(4096)
    scale[small] = 1e-3
    ours, theirs = nn.Parameter(torch.zeros(4096)), nn.Parameter(torch.zeros(4096))
    kinds = (bitsandbytes.optim.AdamW8bit, ours), (torch.optim.AdamW, theirs)
    made = [kind([flat], lr=1e-3, weight_decay=0.0, eps=1e-12) for kind, flat in kinds]
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        gradient = (torch.randn(4096, generator=generator) + 0.5) * scale
        for (_, flat), optimizer in zip(kinds, made, strict=True):
            flat.grad = gradient.clone()
            optimizer.step()
    assert pace[0] < float(ours.detach()[small].mean() / theirs.detach()[small].mean()) < pace[1]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingConfig(optimizer="adamw_8bit")
    optimizers.check(training)
    assert optimizers.state_bytes(TrainingConfig()) == 16
    assert optimizers.state_bytes(training) == pytest.approx(10.03, abs=0.005)
    cpu = torch.device("cpu")
    assert optimizers._tried(cpu) is bitsandbytes.optim.AdamW8bit
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lambda self: None)
    with pytest.raises(
        UserError, match="cannot do that on cpu: its step changes nothing; .* set training.optimizer to"
    ):
        optimizers._tried(cpu)
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lambda self: 1 / 0)
    with pytest.raises(UserError, match='training.optimizer = "adamw_8bit": .* on cpu: division by zero; install'):
        optimizers._tried(cpu)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r'^training.optimizer: "adamw_8bit" needs the package bitsandbytes; pip .*quantised'
    ):
        optimizers.check(training)


def test_it_is_tried_where_it_will_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(optimizers, "_tried", lambda device: tried.append(device.type))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for where in ("none", "cpu"):
            engine = EngineConfig.model_validate({"offload_optimizer": where})
            optimizers.OPTIMIZERS["adamw_8bit"].made(TrainingConfig(), engine, torch.device("cuda"))
    finally:
        dist.destroy_process_group()
    assert tried == ["cuda", "cpu"]
