"""Model cards of adapter folders and merged ones: what they say, what they keep, and that they never cost a save."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.checkpoint import model_card
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.checkpoint.manifest import write_manifest
from dora_dist.checkpoint.model_card import CARD, OURS, About, add_card, progress
from dora_dist.runtime.folders import write_json
from tests import toy

QUERY = "model.layers.0.self_attn.q_proj"
LOGGED = [{"step": 2, "loss": 1.5}, {"step": 4, "eval_loss": 1.25, "eval_runtime": 3.0}, {"step": 4, "loss": 1.0}]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one checkpoint, of a base and of data that lie in folders here, and of data of the hub."""
    base = toy.base_model(tmp_path / "secret place" / "base")
    layer = AdapterLayer(torch.full((2, 36), 0.1), torch.full((36, 2), 0.1), torch.ones(36), 1.0)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    write_peft_folder(checkpoint / "adapter", PeftAdapter(str(base), 2, 2, 0.0, True, {QUERY: layer}))
    config = {
        "model": {"path": str(base), "dtype": "bf16", "storage": "plain"},
        "data": {"train": [str(tmp_path / "mine.json"), "org/texts:part"], "format": "alpaca"},
        "adapter": {"r": 2, "init_from": str(tmp_path / "older"), "target_modules": ["q_proj"]},
        "training": {"learning_rate": 1e-4},
        "logging": {"token": "hf_secret"},
    }
    write_json(tmp_path / "run" / "config.json", config)
    write_json(checkpoint / "trainer_state.json", {"global_step": 4, "log_history": LOGGED})
    write_manifest(checkpoint, {"step": 4})
    return tmp_path / "run"


def merged(run: Path, **options: Any) -> Path:
    output = run.parent / "merged"
    base = json.loads((run / "config.json").read_text())["model"]["path"]
    consolidate(run / "checkpoint-4" / "adapter", base, output, progress=False, **options)
    return output


def test_a_merged_folder_s_card_says_what_it_is_and_nothing_of_this_machine(run: Path, tmp_path: Path) -> None:
    text = (merged(run) / CARD).read_text()
    card = ModelCard.load(tmp_path / "merged" / CARD)
    card.validate  # noqa: B018  # its own check asks the hub
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.datasets == ["org/texts"] and card.data.base_model is None  # a folder is no name of the hub
    assert "`base`" in text and "`mine.json`, `org/texts`, for 4 optimizer steps" in text
    assert "| loss | 1.25 |" in text and "runtime" not in text
    assert "| `adapter.r` | `2` |" in text and '| `adapter.init_from` | `"older"` |' in text
    assert str(tmp_path) not in text and "secret" not in text
    program = text.partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(program.replace('"."', repr(str(tmp_path / "merged"))), found)  # what it says works
    assert found["model"].config.architectures == ["LlamaForCausalLM"]


def test_a_card_of_the_user_s_own_outlives_overwriting_and_ours_does_not(run: Path) -> None:
    card = merged(run) / CARD
    ours = card.read_text()
    card.write_text(ours.replace("# merged", "# edited"))
    assert (merged(run, overwrite=True) / CARD).read_text() == ours
    card.write_text(ours.replace(OURS, "").replace("# merged", "# mine"))
    assert "# mine" in (merged(run, overwrite=True) / CARD).read_text()


def test_an_adapter_s_card_names_its_base_of_the_hub_and_loads_in_peft(run: Path) -> None:
    folder = run / "checkpoint-4" / "adapter"
    base = json.loads((run / "config.json").read_text())["model"]["path"]
    about = About(base="org/base", revision="main", storage="nf4", method="DoRA", task_type="CAUSAL_LM")
    add_card(folder, about)
    card = ModelCard.load(folder / CARD)
    assert (card.data.base_model, card.data.library_name) == ("org/base", "peft")
    assert "dora" in card.data.tags and "held as nf4" in card.text and "with DoRA" in card.text
    assert "take the base as it is, without that rounding" in card.text
    program = card.text.partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(program.replace('"."', repr(str(folder))), found)
    assert found["model"].peft_config["default"].base_model_name_or_path == base


def test_what_goes_wrong_with_a_card_is_a_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_card, "_versions", lambda: 1 / 0)
    assert (merged(run) / "model.safetensors").exists() and not (run.parent / "merged" / CARD).exists()
    said = capsys.readouterr().err
    assert "no model card was written (ZeroDivisionError" in said and "the rest is whole" in said
    shutil.rmtree(run.parent / "merged")


def test_results_are_those_of_the_last_evaluation() -> None:
    assert progress({"global_step": 4, "log_history": LOGGED}) == {"step": 4, "results": {"loss": 1.25}}
    assert progress({}) == {"step": None, "results": {}}


def test_sources_are_the_paths_of_a_mixture_and_of_each_task() -> None:
    train: Any = [{"path": "mine.jsonl", "name": "chats", "format": "messages"}, {"path": ["org/texts:part", "b.json"]}]
    assert list(model_card._sources({"data": {"train": train}})) == ["mine.jsonl", "org/texts", "b.json"]
    assert list(model_card._sources({"data": {"train": {"vqa": ["a.json"], "gqa": "org/b"}}})) == ["a.json", "org/b"]
    assert list(model_card._sources({})) == []
