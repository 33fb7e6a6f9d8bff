"""A training loop of a user's own, through the front door: the example that the documentation shows."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.conftest import ROOT
from tests.ranks import run_ranks


def losses_of_the_example(base: Path, steps: int) -> Any:
    spec = importlib.util.spec_from_file_location("own_loop", ROOT / "examples" / "own_loop.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.main(str(base), steps)


def test_the_example_trains_on_shards(tmp_path: Path) -> None:
    base = toy.base_model(tmp_path / "base")
    for losses in run_ranks(losses_of_the_example, 2, base, 10):
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 0.05


def test_a_model_in_one_process_trains_alike_by_path_and_by_section(tmp_path: Path) -> None:
    from dora_dist import build_model
    from dora_dist.config import AdapterConfig, ModelConfig

    base = toy.base_model(tmp_path / "base")
    adapter = AdapterConfig(r=4, lora_alpha=8.0, target_modules=["q_proj"])
    tokens = toy.tokens()
    losses = []
    for model in (str(base), base, ModelConfig(path=str(base), dtype="bf16")):
        run = build_model(model, adapter)
        trained = [p for p in run.model.parameters() if p.requires_grad]
        assert len(trained) == 3 * len(run.adapted) > 0
        optimizer = torch.optim.AdamW(trained, lr=0.02)
        found = []
        for _ in range(3):
            loss = run.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert found[-1] < found[0]
        losses.append(found)
    assert losses[0] == losses[1] == losses[2]


def test_an_adapter_folder_to_start_from_is_read(tmp_path: Path) -> None:
    from dora_dist import build_model
    from dora_dist.config import AdapterConfig
    from dora_dist.runtime.errors import UserError

    base = toy.base_model(tmp_path / "base")
    with pytest.raises(UserError, match="nothing"):
        build_model(base, AdapterConfig(init_from=str(tmp_path / "nothing")))
