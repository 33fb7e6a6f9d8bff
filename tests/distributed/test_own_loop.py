"""Training loops of a user's own, and TRL's, through the front door: the examples that the documentation shows."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests import toy
from tests.conftest import ROOT
from tests.ranks import run_ranks

EXAMPLES = ROOT / "examples"
BETA = 0.5
SETTINGS: dict[str, Any] = {
    "train_batch_size": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 40},
    "zero_allow_untested_optimizer": True,
}


def example(name: str, *arguments: Any, **options: Any) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(EXAMPLES))  # as Python does for a script: one takes from another
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(*arguments, **options)


def on_a_rank(base: Path, folder: Path) -> dict[str, Any]:
    """Everything that needs two ranks: the examples, and preferences in a loop of our own."""
    from accelerate.state import AcceleratorState

    found = {"own_loop": example("own_loop", str(base), str(folder / "own_loop"), 10)}
    found["preferences"] = preferences(base, folder)
    found["fetches_ahead"] = fetches_ahead(base)
    AcceleratorState._reset_state(reset_partial_state=True)
    found["sft_trainer"] = example("sft_trainer", str(base), str(folder / "sft_trainer"), 8)
    AcceleratorState._reset_state(reset_partial_state=True)
    found["dpo_trainer"] = example("dpo_trainer", str(base), str(folder / "dpo_trainer"), 5, bf16=False)
    return found


# --- preferences, by two forwards of one model ------------------------------------------------------------------------


def pair(rank: int) -> torch.Tensor:
    """A chosen and a rejected text (2, 11)."""
    return torch.randint(5, 300, (2, 11), generator=torch.Generator().manual_seed(rank))


def log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(logits[:, :-1].float(), -1).gather(-1, tokens[:, 1:, None]).sum((1, 2))


def preference_loss(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    margin = policy - reference
    return -F.logsigmoid(BETA * (margin[0] - margin[1]))


def adapter() -> Any:
    from dora_dist.config import AdapterConfig

    return AdapterConfig(r=4, lora_alpha=8.0, target_modules=["q_proj", "down_proj"])


def preferences(base: Path, folder: Path) -> list[float]:
    """DPO on shards: the reference is the model with its adapters off, between a forward and its backward."""
    import deepspeed

    from dora_dist import adapters_off, build_model, save_adapter
    from dora_dist.config import ModelConfig
    from dora_dist.models.build import checkpoint_activations
    from dora_dist.runtime.errors import UserError

    run = build_model(ModelConfig(path=str(base), dtype="fp32"), adapter(), deepspeed=SETTINGS)
    checkpoint_activations(run.model)
    save_adapter(run, folder / "without_an_engine")
    trained = [p for p in run.model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=run.model, optimizer=torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0), config=SETTINGS
    )
    tokens = pair(torch.distributed.get_rank())
    losses = []
    for _ in range(3):
        policy = log_probs(engine(input_ids=tokens).logits, tokens)
        with adapters_off(engine):
            reference = log_probs(engine(input_ids=tokens).logits, tokens)
        loss = preference_loss(policy, reference)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    save_adapter(run, folder / "preferences")
    with pytest.raises(UserError, match="already exists"):
        save_adapter(run, folder / "preferences")
    return losses


def fetches_ahead(base: Path) -> list[bool]:
    """After a step of one forward: whether the engine has its recording after steps with one more, before or after."""
    import deepspeed

    from dora_dist import adapters_off, build_model
    from dora_dist.config import ModelConfig
    from dora_dist.models.build import checkpoint_activations

    run = build_model(ModelConfig(path=str(base), dtype="fp32"), adapter(), deepspeed=SETTINGS)
    checkpoint_activations(run.model)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=run.model, optimizer=torch.optim.AdamW(trained, lr=0.0), config=SETTINGS)
    tokens = pair(torch.distributed.get_rank())
    found = []
    for when in ("never", "after", "before", "after"):
        if when == "before":
            with adapters_off(engine):
                engine(input_ids=tokens)
        policy = log_probs(engine(input_ids=tokens).logits, tokens)
        if when == "after":
            with adapters_off(engine):
                engine(input_ids=tokens)
        engine.backward(policy.sum())
        engine.step()
        found.append(engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace())
    return found[1:]


def preferences_plainly(base: Path) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The same in one process, with a second model: losses of both ranks' pairs, and the values at the end."""
    from dora_dist import build_model
    from dora_dist.config import ModelConfig

    run = build_model(ModelConfig(path=str(base), dtype="fp32"), adapter())
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.0)
    steps = []
    for _ in range(3):
        losses = []
        for tokens in (pair(0), pair(1)):
            with torch.no_grad():
                reference = log_probs(plain(input_ids=tokens).logits, tokens)
            losses.append(preference_loss(log_probs(run.model(input_ids=tokens).logits, tokens), reference))
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append([loss.item() for loss in losses])
    return steps, {name: p.detach().clone() for name, p in trained.items()}


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("own")
    base = toy.base_model(folder / "base")
    return base, folder, run_ranks(on_a_rank, 2, base, folder, timeout=600)


Results = tuple[Path, Path, list[dict[str, Any]]]


def test_the_example_trains_on_shards(results: Results) -> None:
    for found in results[2]:
        losses = found["own_loop"]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 0.05


def test_preferences_with_adapters_off_are_those_with_a_second_model(results: Results) -> None:
    base, folder, ranks = results
    expected, values = preferences_plainly(base)
    assert expected[0] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert expected[2][0] < math.log(2) - 0.01
    for rank, found in enumerate(ranks):
        assert found["preferences"] == pytest.approx([losses[rank] for losses in expected], abs=2e-4)
    saved = peft.load_peft_weights(str(folder / "preferences"))
    for name, value in values.items():
        module, _, kind = name.rpartition(".")
        if kind in ("lora_A", "lora_B"):
            theirs = saved[f"base_model.model.{module}.{kind}.weight"]
            torch.testing.assert_close(theirs.t() if kind == "lora_A" else theirs, value, rtol=0.02, atol=2e-3)


def test_weights_are_fetched_ahead_with_adapters_off_after_one_step_without(results: Results) -> None:
    assert all(found["fetches_ahead"] == [True] * 3 for found in results[2])


def test_what_a_loop_saves_is_read_by_peft_and_here(results: Results) -> None:
    from dora_dist import build_model, consolidate
    from dora_dist.config import ModelConfig

    base, folder, _ = results
    tokens = toy.tokens()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    untrained = plain(input_ids=tokens).logits
    consolidate(folder / "preferences", base, folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    start = adapter().model_copy(update={"init_from": str(folder / "preferences")})
    ours = build_model(ModelConfig(path=str(base), dtype="fp32"), start).model.eval()
    theirs = peft.PeftModel.from_pretrained(plain, folder / "preferences").eval()
    with torch.no_grad():
        expected = ours(input_ids=tokens).logits
        assert (expected - untrained).abs().max() > 1e-3
        torch.testing.assert_close(theirs(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    unmoved = peft.load_peft_weights(str(folder / "without_an_engine"))
    assert all(not values.any() for name, values in unmoved.items() if "lora_B" in name)


def test_trl_trains_our_layers_and_what_it_learns_is_saved(results: Results) -> None:
    _, folder, ranks = results
    for found in ranks:
        assert found["sft_trainer"][-1] < found["sft_trainer"][0] - 0.05
    saved = peft.load_peft_weights(str(folder / "sft_trainer"))
    assert any(values.any() for key, values in saved.items() if "lora_B" in key)


def test_trl_learns_preferences_and_the_reference_is_the_base(results: Results) -> None:
    base, folder, ranks = results
    for found in ranks:
        losses = found["dpo_trainer"]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
        assert losses == sorted(losses, reverse=True)  # with a reference that moves along it stays at log 2
        assert losses[-1] < losses[0] - 0.03
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = toy.tokens()
    with torch.no_grad():
        untrained = plain(input_ids=tokens).logits
        trained = peft.PeftModel.from_pretrained(plain, folder / "dpo_trainer").eval()(input_ids=tokens).logits
    assert (trained - untrained).abs().max() > 1e-3


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
