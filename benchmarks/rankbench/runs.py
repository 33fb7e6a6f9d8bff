"""One run of one method: configured as a user would, trained by `train`, measured on texts it never saw."""

import gc
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

RECIPES = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Task:
    """What is learnt: the encoder, the recipe whose hyper-parameters hold, the metric, how many texts each split has.

    Texts whose rating is within `unclear` of 0 are left out.
    """

    encoder: str
    recipe: str
    label: str
    metric: str
    unclear: float
    train: int = 3000
    validation: int = 1500
    test: int = 3000


TASKS = {
    "sentiment": Task("minilm", "glue_sst2.json", "label", "accuracy", unclear=1.0),
    "rating": Task("bert-tiny", "glue_stsb.json", "rating", "pearson", unclear=0.0),
}


@dataclass(frozen=True)
class Method:
    """A row of the table: `tuned_as` is the method whose learning rate it takes, `share` its part of the full r."""

    title: str
    tuned_as: str
    share: float
    weight_decomposed: bool
    dynamic: bool


METHODS = {
    "lora": Method("LoRA", "lora", 1.0, False, False),
    "dora": Method("DoRA", "lora", 1.0, True, False),
    "lora-half": Method("LoRA", "lora", 0.5, False, False),
    "dynamic": Method("dynamic rank", "dynamic", 0.5, False, True),
    "union": Method("dynamic rank with magnitudes", "dynamic", 0.5, True, True),
}


@dataclass(frozen=True)
class Settings:
    """What all runs share; `folder` has models and texts, and gets the runs.

    No split has more than `limit` texts. `dynamic_options` are further options of dynamic-rank runs, as `dora-dist
    train` takes them.
    """

    folder: Path
    r: int
    epochs: float
    batch: int
    limit: int
    dynamic_options: tuple[str, ...] = ()


def run(settings: Settings, task_name: str, method_name: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """Train, and measure on `split` at the last step (collective); a run that was finished before is not repeated.

    Returns the metric, and how many adapter parameters were trained at the start and at the end.
    """
    task, method = TASKS[task_name], METHODS[method_name]
    folder = settings.folder / "runs" / f"{task_name}-{method_name}-{rate:g}-seed{seed}-{split}"
    options = _options(settings, task_name, method, rate, seed, split, folder)
    result_file = folder / "result.json"
    if result_file.is_file():
        known = json.loads(result_file.read_text())
        if (known["options"], known["limit"]) == (options, settings.limit):
            return known
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    from accelerate.state import AcceleratorState

    from dora_dist.config import RunConfig
    from dora_dist.training.run import train

    AcceleratorState._reset_state(reset_partial_state=True)
    config = RunConfig.load(RECIPES / task.recipe, options, check_files=True)
    checkpoint = train(config)
    gc.collect()  # engine, trainer and callbacks refer to one another
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "options": options,
        "limit": settings.limit,
        "metric": next(line[f"eval_{task.metric}"] for line in reversed(lines) if f"eval_{task.metric}" in line),
        "steps": lines[-1]["step"],
        "parameters_at_start": _parameters_at_start(config),
        "parameters_at_end": _parameters_at_end(checkpoint),
    }
    if dist.get_rank() == 0:
        result_file.write_text(json.dumps(result, indent=1))
    dist.barrier()
    return result


def _options(
    settings: Settings, task_name: str, method: Method, rate: float, seed: int, split: str, folder: Path
) -> list[str]:
    """What departs from the recipe."""
    task, texts = TASKS[task_name], settings.folder / "texts"
    steps = math.ceil(-(-min(task.train, settings.limit) // settings.batch) * settings.epochs)
    fields = {
        "model.path": settings.folder / "models" / task.encoder,
        "model.dtype": "bf16",
        "adapter.weight_decomposed": method.weight_decomposed,
        "adapter.dynamic_rank": method.dynamic,
        "adapter.r": round(settings.r * method.share),
        "data.train": texts / f"{task_name}-train.json",
        "data.validation": texts / f"{task_name}-{split}.json",
        "data.text_fields": "sentence",
        "data.label_field": task.label,
        "data.cutoff_len": 32,
        "training.learning_rate": rate,
        "training.epochs": settings.epochs,
        "training.global_batch_size": settings.batch,
        "training.micro_batch_size": settings.batch // dist.get_world_size(),
        "training.eval_every": steps,
        "training.seed": seed,
        "checkpoint.run_dir": folder,
        "checkpoint.keep_best": False,
        "logging.progress_bar": False,
    }
    shown = {name: str(value).lower() if isinstance(value, bool) else value for name, value in fields.items()}
    options = [f"--{name}={value}" for name, value in shown.items()]
    return [*options, *(settings.dynamic_options if method.dynamic else ())]


def _parameters_at_start(config: Any) -> int:
    """Trainable numbers of a run's adapters as they are injected: neither the head's nor the base's."""
    from dora_dist.adapters.inject import inject
    from dora_dist.models.build import skeleton
    from dora_dist.tasks import task_named
    from dora_dist.training.model import adapter_plan

    model = skeleton(Path(config.model.path), task_named(config.model.task).head(config.model))
    adapted = inject(model, adapter_plan(config.adapter))
    layers = [model.get_submodule(name) for name in adapted]
    return sum(p.numel() for layer in layers for p in layer.adapter_parameters().values())


def _parameters_at_end(checkpoint: Path) -> int:
    """The same in the state that a checkpoint holds."""
    from dora_dist.adapters.methods import DynamicRank, WeightDecomposed
    from dora_dist.checkpoint.state import open_state

    entries = open_state(checkpoint).entries
    ours = tuple(f".{name}.master" for name in WeightDecomposed(DynamicRank()).parameters((1, 1)))
    return sum(entry.numel for name, entry in entries.items() if name.endswith(ours))
