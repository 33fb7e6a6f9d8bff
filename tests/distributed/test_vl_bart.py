"""VL-BART on real ranks: loading, losses, what is trained and what beams write do not know how many there are."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.adapters.methods import LowRank, WeightDecomposed
from dora_dist.models.build import build_model, checkpoint_activations
from dora_dist.models.families import adapter_plan
from dora_dist.models.heads import VISION_SEQ2SEQ_LM
from tests import summaries, vl_bart
from tests.ranks import run_ranks

HEAD = VISION_SEQ2SEQ_LM.with_features(vl_bart.FEATURE_DIM)
PLAN = adapter_plan(WeightDecomposed(LowRank(4, 8.0), norm_gradient="full"))
ROWS, STEPS = 6, 5
ADAM: dict[str, Any] = {"lr": 0.01, "eps": 1e-4}
"""A large eps: Adam would make steps of a whole learning rate out of gradients that are little but rounding."""
GENERATION: dict[str, Any] = {"num_beams": 5, "max_new_tokens": 6, "min_new_tokens": 6}


def batch() -> tuple[dict[str, Tensor], Tensor]:
    """Texts of several lengths, some with fewer features; and labels."""
    inputs = vl_bart.batch(ROWS)
    inputs["attention_mask"][::2, 4:] = 0
    inputs["visual_mask"][1::3, 2:] = 0
    labels = torch.randint(5, 60, (ROWS, 6), generator=torch.Generator().manual_seed(3))
    labels[::2, 4:] = -100
    return inputs, labels


def loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The sum over labelled tokens."""
    written = labels.masked_fill(labels == -100, 1).roll(1, 1)
    logits = model(**inputs, decoder_input_ids=written).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def alone(base: Path) -> dict[str, Any]:
    """Losses, and tokens row by row, of whole parameters in this process."""
    from dora_dist.weights.placement import WholePlacement

    run = build_model(base, PLAN, WholePlacement(), head=HEAD, dtype="fp32")
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], **ADAM)
    inputs, labels = batch()
    losses = []
    for _ in range(STEPS):
        mean = loss(run.model, inputs, labels) / (labels != -100).sum()
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    model: Any = run.model.eval()
    tokens = [
        model.generate(**{name: values[i : i + 1] for name, values in inputs.items()}, **GENERATION, use_cache=True)
        for i in range(ROWS)
    ]
    return {"losses": losses, "tokens": torch.cat(tokens), "embedding": whole_embedding(run.model)}


def whole_embedding(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.model.encoder.visual_embedding.named_parameters()}


def on_ranks(base: Path) -> dict[str, Any]:
    """The same of this rank's shards, every rank with its share of the rows."""
    import deepspeed
    import torch.distributed as dist

    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.placement import ShardedPlacement
    from tests.distributed.test_loading import engine_json

    deepspeed.init_distributed("gloo", verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    settings = {**engine_json(world), "gradient_clipping": 0.0}  # DeepSpeed's default is 1
    placement = ShardedPlacement(settings)
    run = build_model(base, PLAN, placement, refresher=ShardedNormRefresher, head=HEAD, dtype="fp32")
    checkpoint_activations(run.model)
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], **ADAM)
    engine, *_ = deepspeed.initialize(model=run.model, optimizer=optimizer, config=settings)
    inputs, labels = batch()
    own, count = {name: values[rank::world] for name, values in inputs.items()}, (labels != -100).sum()
    losses = []
    for _ in range(STEPS):
        mean = loss(engine, own, labels[rank::world]) / count
        engine.backward(mean * world)  # the engine takes the mean over ranks
        engine.step()
        total = mean.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
    engine.eval()
    tokens = engine.module.generate(**own, **GENERATION, use_cache=True, synced_gpus=world > 1)
    with deepspeed.zero.GatheredParameters(list(run.model.model.encoder.visual_embedding.parameters())):
        embedding = whole_embedding(run.model)
    return {"losses": losses, "tokens": tokens, "embedding": embedding, "read": run.base_bytes_read}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain BART: each rank makes its own share of the visual embedding."""
    return summaries.base_model(tmp_path_factory.mktemp("vl-bart") / "base")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_train_and_write_as_whole_weights_do(world_size: int, base: Path) -> None:
    expected = alone(base)
    assert expected["losses"][-1] < expected["losses"][0] - 1
    size = (base / "model.safetensors").stat().st_size
    for rank, found in enumerate(run_ranks(on_ranks, world_size, base)):
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert torch.equal(found["tokens"], expected["tokens"][rank::world_size])
        for name, values in expected["embedding"].items():
            torch.testing.assert_close(found["embedding"][name], values, atol=1e-4, rtol=0)
        assert found["read"] <= size / world_size + 4096
