"""What ranks do in the training tests: whole runs through `train`, several in one process."""

from pathlib import Path
from typing import Any

from dora_dist.checkpoint import run_folder
from dora_dist.config import RunConfig
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"


def config(base: Path, data: Path, run_dir: Path, /, **changes: dict[str, Any]) -> dict[str, Any]:
    """A toy run's configuration as a dict; `changes` are merged section by section.

    A method that is named may not scale its update, so lora_alpha is not set for it.
    """
    scaled = {} if "method" in changes.get("adapter", {}) else {"lora_alpha": 8.0}
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(base), "dtype": "fp32"},
        "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"], **scaled},
        "data": {"train": str(data), "validation_samples": 5, "cutoff_len": 192},
        "training": {
            "learning_rate": 0.01,
            "max_steps": 6,
            "global_batch_size": 6,
            "micro_batch_size": 1,
            "warmup_steps": 2,
            "activation_checkpointing": False,
        },
        "checkpoint": {"run_dir": str(run_dir), "save_every": 3, "keep_best": False},
        "engine": {"param_persistence_threshold": 40},
        "logging": {"every": 1, "progress_bar": False, "report": False, "samples": 0},
        "analysis": {"every": 0},
    }
    for section, fields in changes.items():
        sections[section] = {**sections.get(section, {}), **fields}
    return sections


def run(*configurations: dict[str, Any]) -> list[dict[str, Any]]:
    """Train each configuration on this rank, one after the other; returns losses and the last evaluation."""
    from accelerate.state import AcceleratorState

    from dora_dist.training.run import train
    from dora_dist.zero3 import gather

    gather.IN_PLACE_BYTES = 4096  # toy weights too are gathered as large ones are
    results = []
    for raw in configurations:
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = RunConfig.from_dict(raw)
        train(settings)
        results.append(metrics(Path(settings.checkpoint.run_dir)))
    return results


def train_file(file: Path) -> None:
    """Train a config file on this rank, from inside its folder."""
    import os

    from dora_dist.training.run import train

    os.chdir(file.parent)
    train(RunConfig.load(file))


def fails(raw: dict[str, Any]) -> str:
    """Run on a rank, expecting a UserError; returns its message."""
    from dora_dist.runtime.errors import UserError

    try:
        run(raw)
    except UserError as error:
        return str(error)
    raise AssertionError("the run should have been refused")


def train_recipes(recipes: dict[str, list[str]]) -> dict[str, dict[int, float]]:
    """Train files of configs/, each with its options, on this rank; returns the losses of each."""
    from accelerate.state import AcceleratorState

    from dora_dist.training.run import train

    found = {}
    for name, overrides in recipes.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        recipe = RunConfig.load(CONFIGS / f"{name}.json", overrides, check_files=True)
        train(recipe)
        found[name] = metrics(Path(recipe.checkpoint.run_dir))["losses"]
    return found


def options(fields: dict[str, Any]) -> list[str]:
    """Fields as on a command line."""
    return [f"--{field}={value}" for field, value in fields.items()]


def metrics(run_dir: Path) -> dict[str, Any]:
    """Losses by step, as metrics.jsonl has them."""
    lines = run_folder.metrics(run_dir)
    return {
        "losses": {line["step"]: line["loss"] for line in lines if "loss" in line},
        "eval": {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line},
    }
