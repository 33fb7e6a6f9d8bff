"""What an optimizer step communicates when parameters are small enough to stay resident."""

from typing import Any

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
    kinds = ("c10d::_allgather_base_", "c10d::allgather_", "c10d::broadcast_")
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
