"""What an optimizer step communicates when parameters are small enough to stay resident."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.test_norms import Chain, engine_json, place_everything
from tests.ranks import run_ranks


def run() -> dict[str, Any]:
    """Train a chain whose parameters are all persistent; the gathers of its last step, and what is resident then."""
    import deepspeed
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from dora_dist.adapters.inject import by_pattern, inject
    from dora_dist.adapters.methods import LowRank, WeightDecomposed
    from dora_dist.zero3.gather import gathered
    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.optimizer_state import read_state
    from dora_dist.zero3.placement import ShardedPlacement
    from dora_dist.zero3.state_names import MOMENTS

    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = Chain()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject(model, by_pattern(WeightDecomposed(LowRank(3, 5.0)), [r"layers\.\d+"]))
    config = engine_json(10**6, 1, dist.get_world_size())
    placement = ShardedPlacement(config)
    place_everything(model, placement, weights)
    ShardedNormRefresher(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    before = [read_state(p, key) for p in model.parameters() if p.requires_grad for key in MOMENTS]

    def step() -> None:
        engine.backward(engine(torch.ones(4, 6)).square().sum())
        engine.step()

    step()
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    kinds = ("c10d::_allgather_base_", "c10d::allgather_", "c10d::recv_")
    gathers = [event.input_shapes[0] for event in profiler.events() if event.name in kinds]
    trained = sum(p.ds_numel_aligned for p in model.parameters() if p.requires_grad)
    resident = {name: p.data.clone() for name, p in model.named_parameters()}
    masters = {name: deepspeed.utils.safe_get_full_fp32_param(p) for name, p in model.named_parameters()}
    written, unfrozen = (model.get_parameter(f"layers.{layer}.weight") for layer in (0, 1))
    with deepspeed.zero.GatheredParameters([written], modifier_rank=0):
        written.data.fill_(2.0)
    unfrozen.requires_grad_(True)
    unfrozen.partition()  # as the engine does at every step,
    unfrozen.ds_tensor.data.fill_(3.0)  # and as an optimizer would write it
    with gathered([written, unfrozen]):
        after = [weight.detach().mean().item() for weight in (written, unfrozen)]
    return {
        "gathers": gathers,
        "trained": trained,
        "resident": resident,
        "masters": masters,
        "weights": weights,
        "moments before": sum(float(moment.abs().sum()) for moment in before),
        "after": after,
    }


def test_a_step_gathers_the_adapters_once_and_the_base_never() -> None:
    for rank in run_ranks(run, 2):
        assert rank["gathers"] == [[rank["trained"]]]  # one for all that the step changed; nothing of the base
        for name, resident in rank["resident"].items():
            expected: Tensor = rank["weights"].get(name, rank["masters"][name])
            assert torch.equal(resident, expected), name
        assert rank["moments before"] == 0.0  # there are none before the first step, which is to say 0
        assert rank["after"] == [2.0, 3.0]  # what was kept of a frozen parameter does not outlive it


# Cut rows, ranks of nothing but padding, dtypes that cannot share a buffer, and one that is gathered alone.
ODD = [
    ((5, 3), torch.bfloat16),
    ((1,), torch.bfloat16),
    ((2, 3), torch.uint8),
    ((7,), torch.float32),
    ((300,), torch.bfloat16),
]


def flat_and_engine() -> dict[str, Any]:
    """The same parameters by both gathers, and the same gradients by both reductions, bit for bit as bytes."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced
    from deepspeed.runtime.zero import stage3
    from torch import nn

    from dora_dist.weights.placement import in_place
    from dora_dist.zero3 import flat, gather
    from dora_dist.zero3.placement import ShardedPlacement

    deepspeed.init_distributed("gloo", verbose=False)
    placement = ShardedPlacement(engine_json(0, 1, dist.get_world_size()))
    generator = torch.Generator().manual_seed(1)
    wholes = [torch.randint(1, 99, shape, generator=generator).to(dtype) for shape, dtype in ODD]

    def gathered() -> list[Tensor]:
        def filled(whole: Tensor) -> nn.Parameter:
            def fill(start: int, stop: int, out: Tensor) -> None:
                out.copy_(whole.flatten()[start:stop])

            parameter = nn.Parameter(torch.empty(whole.shape, dtype=whole.dtype), requires_grad=False)
            return placement.place([parameter], whole.numel(), in_place(fill))[0]

        parameters = [filled(whole) for whole in wholes]
        parameters[0].all_gather_coalesced(parameters[::-1]).wait()
        return [p.data.clone() for p in parameters]

    installed = stage3.reduce_scatter_coalesced is flat.reduce_scatter
    flat.ALONE_BYTES = 600
    ours = gathered()
    gather.IN_PLACE_BYTES = 1
    sent = gathered()
    gather.IN_PLACE_BYTES = 2**20
    flat.ENGINES = ()
    engines = gathered()
    reduced = []
    for shapes in ([(5, 3), (1,), (7,)], [(2 * dist.get_world_size(), 3)], [(5, 3)]):
        grads = [torch.randn(shape, generator=torch.Generator().manual_seed(dist.get_rank())) for shape in shapes]
        both = [average([g.clone() for g in grads]) for average in (flat.reduce_scatter, reduce_scatter_coalesced)]
        reduced.append(both)
    return {
        "installed": installed,
        "wholes": wholes,
        "ours": ours,
        "sent": sent,
        "engine's": engines,
        "reduced": reduced,
    }


@pytest.mark.parametrize("world", [2, 3])
def test_flat_gathers_and_reductions_are_the_engines_to_the_last_bit(world: int) -> None:
    for rank in run_ranks(flat_and_engine, world):
        assert rank["installed"]
        forms = (rank["ours"], rank["sent"], rank["engine's"])
        for whole, *found in zip(rank["wholes"], *forms, strict=True):
            assert all(other.dtype == whole.dtype and torch.equal(other, whole) for other in found)
        for ours, engines in rank["reduced"]:
            assert [part.tolist() for part in ours] == [part.tolist() for part in engines]
