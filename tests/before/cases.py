"""The runs whose files are kept, and what both the old and today's code do with them."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dora_dist import cli
from tests.distributed import training_runs

PLACE = Path("/tmp/dora_dist_before")
KEPT = Path(__file__).parent / "files"
EXPECTED = Path(__file__).parent / "expected.json"


@dataclass(frozen=True)
class Case:
    """A run: its base and data, its checkpoint that is kept (`step`), and the options of `dora-dist evaluate`."""

    base: str
    data: str
    step: int
    evaluated: tuple[str, ...]
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)


_LANGUAGE = ("--mode", "loss", "--dtype", "fp32")
_NARROW = {"r": 2, "lora_alpha": 4.0}
_DYNAMIC: dict[str, dict[str, Any]] = {
    "adapter": {"dynamic_rank": True, "prune_every": 1, "target_modules": ["q_proj", "v_proj"]},
    "training": {"max_steps": 10},
    "checkpoint": {"keep_last": 9, "save_every": 1},
}
_PICTURES: dict[str, dict[str, Any]] = {
    "model": {"task": "image_text_to_text"},
    "adapter": {"target_modules": None, **_NARROW},
    "data": {
        "format": "llava",
        "image_folder": "pictures",
        "validation_samples": 0,
        "loss_on": "answer",
        "group_by_modality_length": False,
    },
    "training": {"learning_rates": {"multi_modal_projector": 0.002}},
}
CASES = {
    "plain": Case(
        "llama",
        "records.json",
        3,
        _LANGUAGE,
        {"adapter": {"target_modules": ["q_proj", "down_proj"], "magnitude_only_modules": ["o_proj"], **_NARROW}},
    ),
    "dynamic": Case("llama", "records.json", 4, _LANGUAGE, _DYNAMIC),
    "compacted": Case("llama", "records.json", 7, _LANGUAGE, _DYNAMIC),
    "classifier": Case(
        "bert",
        "labelled.json",
        3,
        (),
        {
            "model": {"task": "sequence_classification", "num_labels": 2},
            "adapter": {"target_modules": None, **_NARROW},
            "data": {"format": "classification", "text_fields": ["sentence1", "sentence2"], "cutoff_len": 32},
            "training": {"eval_every": 3, "metric": "accuracy"},
        },
    ),
    "assistant": Case(
        "llava",
        "conversations.json",
        3,
        ("--format", "captions", "--dtype", "fp32", "--max-new-tokens", "4"),
        _PICTURES,
    ),
}


def configuration(name: str, folder: Path, run_dir: Path) -> dict[str, Any]:
    """The configuration of a case, with the files that are in `folder`."""
    case = CASES[name]
    changes = {section: dict(fields) for section, fields in case.changes.items()}
    changes["data"] = {"cache": None, **changes.get("data", {})}
    if "image_folder" in changes["data"]:
        changes["data"]["image_folder"] = str(folder / "data" / "pictures")
    return training_runs.config(folder / "bases" / case.base, folder / "data" / case.data, run_dir, **changes)


def resumed(name: str, folder: Path, run_dir: Path) -> dict[str, Any]:
    """The config.json that the run wrote, for its files that are in `folder` now."""
    raw: dict[str, Any] = json.loads((run_dir / "config.json").read_text())
    changes = configuration(name, folder, run_dir)
    raw["model"]["path"] = changes["model"]["path"]
    raw["data"]["train"] = changes["data"]["train"]
    raw["data"]["image_folder"] = changes["data"].get("image_folder")
    raw["checkpoint"] |= {"run_dir": str(run_dir), "resume": "auto"}
    return raw


def started(folder: Path, run_dir: Path) -> dict[str, Any]:
    """A new run from the adapter of the plain one."""
    raw = configuration("plain", folder, run_dir)
    raw["adapter"]["init_from"] = str(folder / "plain" / "checkpoint-3" / "adapter")
    return raw


def train(*configurations: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses by step of each run, on this rank."""
    torch.set_num_threads(1)
    return [found["losses"] for found in training_runs.run(*configurations)]


def merged(case: str, folder: Path, output: Path) -> dict[str, float]:
    """Merge a run's checkpoint with the command line; returns a number for each tensor that any of its values moves."""
    base = str(folder / "bases" / CASES[case].base)
    words = ["consolidate", str(folder / case), "--base", base, "--output", str(output), "--dtype", "fp32"]
    assert cli.main(words) == 0
    found = {}
    for name, values in load_file(output / "model.safetensors").items():
        weights = torch.arange(1, values.numel() + 1, dtype=torch.float64).cos()
        found[name] = float(values.double().flatten() @ weights)
    return found


def evaluated(name: str, folder: Path, output: Path) -> dict[str, Any]:
    """What the command line measures of a run's checkpoint."""
    case = CASES[name]
    task = f"kept={folder / 'data' / ('captions.json' if name == 'assistant' else case.data)}"
    words = [
        "evaluate",
        str(folder / name),
        "--base",
        str(folder / "bases" / case.base),
        "--tasks",
        task,
        *case.evaluated,
    ]
    words += ["--image-folder", str(folder / "data" / "pictures")] if name == "assistant" else []
    assert cli.main([*words, "--output", str(output)]) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    measured: dict[str, Any] = found["tasks"]["kept"]
    return {key: value for key, value in measured.items() if isinstance(value, int | float) and key != "seconds"}


def arithmetic(folder: Path) -> list[str]:
    """Numbers that transformers alone computes, bit for bit: where they differ, the processor or a library does."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "bases" / "llama", dtype=torch.float32)
    ids = torch.arange(3, 99).view(2, 48)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    norms = [float(p.grad.detach().norm()) for p in model.parameters()]
    return [value.hex() for value in (float(loss.detach()), math.fsum(norms), *norms)]


NOTHING_SAID = {"model": {"path": "base"}, "data": {"train": "data.json"}, "checkpoint": {"run_dir": "run"}}


def with_defaults(file: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """What a configuration file comes to."""
    raw = json.loads(file.read_text())
    understood = {section: {**fields, **raw.get(section, {})} for section, fields in defaults.items()}
    understood["checkpoint"]["run_dir"] = raw.get("checkpoint", {}).get("run_dir", f"runs/{file.stem}")
    return understood
