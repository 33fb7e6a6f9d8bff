"""A model to ask questions of, in one process: plain, or with an adapter on its base."""

from pathlib import Path
from typing import Any

import torch

from dora_dist import run_folder
from dora_dist.adapters.inject import like
from dora_dist.adapters.peft_format import CONFIG_NAME, PeftFolder, read_peft_folder
from dora_dist.errors import UserError
from dora_dist.hub import fetch
from dora_dist.models.build import DTYPES, build_model
from dora_dist.models.folder import (
    GENERATION_CONFIG,
    ModelFolder,
    generation_config,
    not_a_folder,
    read_config,
    reason,
    transformers_config,
)
from dora_dist.models.placement import WholePlacement
from dora_dist.models.tasks import (
    CLASSIFICATION,
    GENERATIVE,
    Task,
    auto_class,
    model_class,
    task_of_adapter,
    task_of_model,
)
from dora_dist.models.tokenizer import load_tokenizer
from dora_dist.models.unused import say_unused
from dora_dist.models.vocabulary import agree_on_padding, refuse_tokens_without_rows
from dora_dist.zero3.loading import is_finite


def load_for_inference(path: str, dtype: str = "bf16") -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, on the accelerator if there is one.

    `path` is the Hugging Face folder or hub name of a model of one of our tasks, or else a PEFT folder, a checkpoint
    or a run folder, whose adapter is then put on its base unmerged, for the task that it was trained for. Raises
    UserError if it is none of these.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    adapter = adapter_at(path)
    if adapter is None:
        base = _folder(path)
        model, tokenizer = _plain(base, dtype)
    else:
        base = _base_of(adapter)
        model, tokenizer = _adapted(adapter, base, dtype, device)
    refuse_tokens_without_rows(model, tokenizer, base)
    model.config.use_cache = True
    if head := model.get_output_embeddings():
        head.register_forward_pre_hook(_contiguous)
    return model.to(device).eval().requires_grad_(False), tokenizer


def _plain(folder: Path, dtype: str) -> tuple[Any, Any]:
    """A whole model, read by transformers, which would make up what is missing and only say so in its log."""
    opened = ModelFolder.open(folder)
    task = task_of_model(opened.config)
    model_class(transformers_config(folder), task)
    if (folder / GENERATION_CONFIG).exists():
        generation_config(folder)
    try:
        model, report = auto_class(task).from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except Exception as error:  # each family checks its fields in its own way
        raise UserError(f"{folder}: transformers cannot load it: {reason(error)}") from error
    doubt = "is this folder the model that its config.json describes?"
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} in all); {doubt}")
    for name, there, here in sorted(report["mismatched_keys"]):
        raise UserError(f"{folder}: tensor {name!r} has shape {list(there)}, the model needs {list(here)}; {doubt}")
    say_unused(opened, sorted(report["unexpected_keys"]), model)
    if damaged := [name for name, values in model.named_parameters() if not is_finite(values)]:
        raise UserError(f"{folder}: tensor {damaged[0]!r} holds NaN or infinity; download or copy the folder again")
    return model, _tokenizer(folder, task, model)


def _contiguous(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Generation passes on a slice, the last position of each sequence; torch would copy the weight for each one."""
    return tuple(values.contiguous() for values in inputs)


def task_at(path: str) -> Task:
    """The task of the model that `load_for_inference` would load. Raises UserError as that does."""
    adapter = adapter_at(path)
    return task_of_model(read_config(_folder(path))) if adapter is None else task_of_adapter(PeftFolder.open(adapter))


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
        remedy = "give a model, PEFT, checkpoint or run folder, or a hub name"
        raise UserError(f"{path}: {not_a_folder(folder, remedy)}")
    return folder


def _adapted(folder: Path, base: Path, dtype: str, device: torch.device | None) -> tuple[Any, Any]:
    adapter = read_peft_folder(folder)
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
    return run.model, _tokenizer(base, run.task, run.model)


def _tokenizer(folder: Path, task: Task, model: Any) -> Any:
    tokenizer = load_tokenizer(folder, generative=task.name in GENERATIVE)
    if task.name == CLASSIFICATION:
        agree_on_padding(model, tokenizer)
    return tokenizer


def _base_of(adapter: Path) -> Path:
    own, run = PeftFolder.open(adapter).config, run_folder.config_of(adapter).get("model", {})
    name = run.get("path") or own.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: does not name its base model; set base_model_name_or_path in its config")
    return Path(name) if Path(name).is_dir() else fetch(name, (run if run.get("path") else own).get("revision"))
