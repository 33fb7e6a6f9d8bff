"""rsLoRA, NEFTune and a schedule of transformers on ranks: what they do to a run, and to one that goes on."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM

from dora_dist.checkpoint import run_folder
from tests import toy
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks

OPTIONS: dict[str, Any] = {
    "schedule": "cosine_with_min_lr",
    "schedule_settings": {"min_lr_rate": 0.25},
    "neftune_alpha": 5.0,
    "max_steps": 4,
    "warmup_steps": 1,
    "eval_every": 2,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run with all options, one that goes on from its second step, one without noise; on two ranks."""
    folder = toy.training_folder(tmp_path_factory.mktemp("options"))

    def described(name: str, resume: str | None = None, **training: Any) -> dict[str, Any]:
        return config(
            folder / "base",
            folder / "data.json",
            folder / name,
            adapter={"use_rslora": True},
            training={**OPTIONS, **training},
            checkpoint={"save_every": 2, "resume": resume},
        )

    whole, quiet = described("whole"), described("quiet", neftune_alpha=None)
    resumed = described("resumed", str(folder / "whole" / "checkpoint-2"))
    return folder, run_ranks(run, 2, whole, resumed, quiet)[0]


def test_a_resumed_run_has_the_same_noise_and_rates(results: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (whole, resumed, quiet) = results
    assert [resumed["losses"][step] for step in (3, 4)] == [whole["losses"][step] for step in (3, 4)]
    assert resumed["eval"][4] == whole["eval"][4]
    assert all(whole["losses"][step] != quiet["losses"][step] for step in (1, 2, 3, 4))


def test_the_schedule_is_the_one_that_was_named(results: tuple[Path, list[dict[str, Any]]]) -> None:
    lines = run_folder.metrics(results[0] / "whole")
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == pytest.approx([0.0, 0.01, 0.01 * (0.25 + 0.75 * 0.75), 0.01 * (0.25 + 0.75 * 0.25)])


def test_peft_reads_the_scale_over_the_root(results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder = results[0]
    adapter = folder / "whole" / "checkpoint-4" / "adapter"
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert (said["use_rslora"], said["lora_alpha"], said["r"]) == (True, 8, 4)
    assert not said["alpha_pattern"]
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), adapter)
    scales = {m.scaling["default"] for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert scales == {8 / 4**0.5}
