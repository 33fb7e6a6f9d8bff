"""A head that is the embedding, of which one is trained: untied on ranks, in the adapter's folder and after it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks


def test_training_one_use_of_a_tied_weight_leaves_the_other_as_it_was(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dora_dist.checkpoint.consolidate import consolidate

    base = toy.base_model(tmp_path / "base", tie_word_embeddings=True)
    data = toy.write_records(tmp_path / "data.json", 25)
    trained: dict[str, Any] = {"trained_modules": ["embed_tokens"]}
    adapter = tmp_path / "first" / "checkpoint-4" / "adapter"
    first = config(base, data, tmp_path / "first", adapter=trained, training={"max_steps": 4})
    again = {**trained, "init_from": str(adapter)}
    second = config(base, data, tmp_path / "second", adapter=again, training={"max_steps": 1})
    losses = [found["losses"] for found in run_ranks(run, 2, first, second)[0]]
    assert losses[0][4] < losses[0][1] and losses[1][1] < losses[0][1]

    consolidate(adapter, base, tmp_path / "merged", progress=False)
    ids = toy.tokens()
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    embedding = plain.model.embed_tokens.weight.detach().clone()
    assert torch.equal(merged.lm_head.weight, embedding)
    assert not torch.equal(merged.model.embed_tokens.weight, embedding)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        peft = PeftModel.from_pretrained(plain, str(adapter))
    assert (merged(ids).logits - peft(ids).logits).abs().max() < 1e-4
