"""A model to ask questions of, in one process: plain, or with an adapter on its base."""

import json
from pathlib import Path
from typing import Any

import torch

from dora_dist import run_folder
from dora_dist.adapters.inject import like
from dora_dist.adapters.peft_config import CONFIG_NAME
from dora_dist.adapters.peft_format import PeftFolder, read_peft_folder
from dora_dist.errors import UserError
from dora_dist.hub import fetch
from dora_dist.models.build import DTYPES, build_model
from dora_dist.models.placement import WholePlacement
from dora_dist.models.tasks import GENERATIVE, Task, auto_class, task_of_adapter, task_of_model
from dora_dist.models.tokenizer import load_tokenizer


def load_for_inference(path: str, dtype: str = "bf16") -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, on the accelerator if there is one.

    `path` is the Hugging Face folder or hub name of a model of one of our tasks, or else a PEFT folder, a checkpoint
    or a run folder, whose adapter is then put on its base unmerged, for the task that it was trained for. Raises
    UserError if it is none of these.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    adapter = adapter_at(path)
    if adapter is None:
        folder = _folder(path)
        task = task_of_model(_config(folder))
        model: Any = auto_class(task).from_pretrained(folder, dtype=DTYPES[dtype], use_safetensors=True)
        tokenizer = load_tokenizer(folder, generative=task.name in GENERATIVE)
    else:
        model, tokenizer = _adapted(adapter, dtype, device)
    model.config.use_cache = True
    if head := model.get_output_embeddings():
        head.register_forward_pre_hook(_contiguous)
    return model.to(device).eval().requires_grad_(False), tokenizer


def _contiguous(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Generation passes on a slice, the last position of each sequence; torch would copy the weight for each one."""
    return tuple(values.contiguous() for values in inputs)


def task_at(path: str) -> Task:
    """The task of the model that `load_for_inference` would load. Raises UserError as that does."""
    adapter = adapter_at(path)
    return task_of_model(_config(_folder(path))) if adapter is None else task_of_adapter(PeftFolder.open(adapter))


def base_folder(path: str) -> Path:
    """The folder of the plain model that `load_for_inference` would load, alone or under an adapter."""
    adapter = adapter_at(path)
    return _folder(path) if adapter is None else _base_of(adapter)


def adapter_at(path: str) -> Path | None:
    """The PEFT folder that `path` means; None if it is a plain model. Raises UserError if it is neither."""
    from dora_dist.consolidate import find_adapter

    folder = _folder(path)
    is_adapters = any((place / CONFIG_NAME).exists() for place in (folder, folder / run_folder.ADAPTER))
    if any(folder.glob("*.safetensors")) and not is_adapters:  # a checkpoint has its state in such a file, too
        return None
    return find_adapter(folder)[0]


def _folder(path: str) -> Path:
    from dora_dist.config import is_local

    folder = Path(path) if is_local(path) else fetch(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give a model, PEFT, checkpoint or run folder, or a hub name")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error}); give a Hugging Face model folder") from error
    return config if isinstance(config, dict) else {}


def _adapted(folder: Path, dtype: str, device: torch.device | None) -> tuple[Any, Any]:
    adapter = read_peft_folder(folder)
    base = _base_of(folder)
    placement = WholePlacement(device or "cpu")
    run = build_model(
        base,
        like(adapter),
        placement,
        dtype=dtype,
        task=task_of_adapter(PeftFolder.open(folder)),
        trained_modules=adapter.modules_to_save,
        start_from=adapter,
    )
    return run.model, load_tokenizer(base, generative=run.task.name in GENERATIVE)


def _base_of(adapter: Path) -> Path:
    own, run = PeftFolder.open(adapter).config, run_folder.config_of(adapter).get("model", {})
    name = run.get("path") or own.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: does not name its base model; set base_model_name_or_path in its config")
    return Path(name) if Path(name).is_dir() else fetch(name, (run if run.get("path") else own).get("revision"))
