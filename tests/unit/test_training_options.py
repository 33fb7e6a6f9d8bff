"""Options of training and of the scale: rsLoRA, NEFTune, schedules."""

import inspect
import math
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from dora_dist import build_model
from dora_dist.adapters.methods import chosen
from dora_dist.config import AdapterConfig, TrainingConfig
from dora_dist.config.schedules import SETTINGS, ScheduleName, conflicts
from dora_dist.runtime.errors import UserError
from dora_dist.training.noise import add_noise
from dora_dist.training.rates import library_name, shares
from tests import toy

RSLORA: dict[str, Any] = {"r": 4, "lora_alpha": 8.0, "use_rslora": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.base_model(tmp_path_factory.mktemp("options") / "base")


# --- rsLoRA -----------------------------------------------------------------------------------------------------------


def test_rslora_scales_by_the_root_of_r() -> None:
    assert chosen(AdapterConfig(**RSLORA)).scaling == pytest.approx(8 / math.sqrt(4))
    assert chosen(AdapterConfig(**RSLORA, weight_decomposed=False)).scaling == pytest.approx(4.0)
    dynamic = {**RSLORA, "dynamic_rank": True}
    assert chosen(AdapterConfig(**dynamic)).scaling == pytest.approx(8 / math.sqrt(4))  # r is left, of 6
    assert chosen(AdapterConfig(**dynamic, component_scale="paper")).scaling == pytest.approx(8 / math.sqrt(6))


def test_a_folder_of_peft_with_rslora_is_the_same_function_here(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, use_dora=True, target_modules=["q_proj"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(model, settings)
    theirs.save_pretrained(tmp_path / "adapter")
    config = AdapterConfig(**RSLORA, target_modules=["q_proj"], init_from=str(tmp_path / "adapter"))
    ours = build_model(base, config)
    tokens = toy.tokens()
    with torch.no_grad():
        expected = theirs.eval()(input_ids=tokens).logits
        found = ours.model.eval().float()(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    with pytest.raises(UserError, match=r"adapter.lora_alpha / adapter.r = 2 \(set adapter.lora_alpha to 16\)"):
        build_model(base, config.model_copy(update={"use_rslora": False}))
    with pytest.raises(UserError, match=r"sqrt\(adapter.r\) = 2 \(set adapter.lora_alpha to 8\)"):
        build_model(base, config.model_copy(update={"lora_alpha": 4.0}))


def test_a_method_without_a_scale_refuses_rslora() -> None:
    with pytest.raises(UserError, match=r"adapter.use_rslora = true: the method 'mora' does not scale its update"):
        chosen(AdapterConfig(method="mora", use_rslora=True))
    with pytest.raises(UserError, match=r"adapter.use_rslora = true: has no meaning for adapter.method = .full"):
        chosen(AdapterConfig(method="full", use_rslora=True))


# --- NEFTune ----------------------------------------------------------------------------------------------------------


def test_noise_is_uniform_of_the_papers_width_and_off_in_evaluation(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = toy.tokens()
    embeddings = model.get_input_embeddings()
    plain = embeddings(tokens)
    add_noise(model, 5.0)
    noise = (embeddings.train()(tokens) - plain).detach()
    most = 5.0 / math.sqrt(tokens.shape[1] * plain.shape[-1])
    assert 0.95 * most < noise.abs().max() <= most * (1 + 1e-4)
    assert noise.std() == pytest.approx(most / math.sqrt(3), rel=0.1)
    assert torch.equal(embeddings.eval()(tokens), plain)


def test_noise_reaches_what_an_encoder_decoder_reads() -> None:
    parts, kinds = ("encoder", "decoder"), ("layers", "attention_heads", "ffn_dim")
    sizes = {f"{part}_{kind}": 1 for part in parts for kind in kinds}
    model = BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=16, **sizes))
    tokens = torch.arange(5, 25)[None]
    encoder = model.get_encoder().eval()
    plain = encoder.embed_tokens(tokens)
    add_noise(model, 5.0)
    assert torch.equal(encoder.embed_tokens(tokens), plain)
    assert not torch.equal(encoder.train().embed_tokens(tokens), plain)


# --- schedules --------------------------------------------------------------------------------------------------------

GIVEN: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.05},
    "warmup_stable_decay": {"num_decay_steps": 30, "decay_type": "linear"},
}


def test_schedules_are_those_of_transformers_with_their_settings() -> None:
    names = {library_name(name) for name in get_args(ScheduleName)}
    assert {kind.value for kind in SchedulerType} - names == {"constant", "reduce_lr_on_plateau", "greedy"}
    common = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name in get_args(ScheduleName):
        function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(library_name(name))]
        assert set(SETTINGS[name]) == set(inspect.signature(function).parameters) - common, name


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_every_schedule_warms_up_to_its_peak(name: str) -> None:
    found = shares(TrainingConfig(schedule=name, schedule_settings=GIVEN.get(name, {}), warmup_steps=10), 100)
    assert len(found) == 100
    assert found[:9] == sorted(found[:9])
    assert max(found) == pytest.approx(found[10], rel=0.01) == pytest.approx(1.0, rel=0.01)
    assert found[-1] == pytest.approx(1.0) if name == "constant" else found[-1] < 1


def test_settings_that_a_schedule_cannot_have_are_refused() -> None:
    [line] = conflicts("cosine", {"power": 2})
    assert line.startswith('training.schedule_settings: "power" (of polynomial) is not a setting of training.schedule')
    assert line.endswith("it has num_cycles")
    [line] = conflicts("warmup_stable_decay", {})
    assert 'training.schedule = "warmup_stable_decay" needs num_decay_steps' in line
    [line] = conflicts("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1})
    assert "min_lr and min_lr_rate say the same" in line
    for name, settings in (
        ("polynomial", {"lr_end": 1.0}),
        ("polynomial", {"power": "two"}),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "steep"}),
    ):
        with pytest.raises(UserError, match=r"training.schedule_settings = .*correct it for training.schedule = "):
            shares(TrainingConfig(schedule=name, schedule_settings=settings), 10)
