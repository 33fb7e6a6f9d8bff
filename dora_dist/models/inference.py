"""A model to ask questions of, in one process: plain, or with an adapter on its base."""

from pathlib import Path
from typing import Any

import torch

from dora_dist.errors import UserError
from dora_dist.models.build import DTYPES, build_model
from dora_dist.models.hub import fetch
from dora_dist.models.placement import WholePlacement
from dora_dist.models.tasks import CAUSAL_LM, task_of
from dora_dist.models.tokenizer import load_tokenizer


def load_for_inference(path: str, dtype: str = "bf16") -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, on the accelerator if there is one.

    `path` is the Hugging Face folder or hub name of a causal language model, or else a PEFT folder, a checkpoint or
    a run folder, whose adapter is then put on its base unmerged, for the task that it was trained for. Raises
    UserError if it is none of these.
    """
    from dora_dist.config import is_local

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    folder = Path(path) if is_local(path) else fetch(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give a model, PEFT, checkpoint or run folder, or a hub name")
    if any(folder.glob("*.safetensors")) and not (folder / "adapter_config.json").exists():
        model = _plain(folder, dtype).to(device)
        tokenizer = load_tokenizer(folder)
    else:
        model, tokenizer = _adapted(folder, dtype, device)
    model.config.use_cache = True
    return model.eval().requires_grad_(False), tokenizer


def _plain(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], use_safetensors=True)


def _adapted(folder: Path, dtype: str, device: torch.device | None) -> tuple[Any, Any]:
    from dora_dist.adapters.inject import like
    from dora_dist.adapters.peft_format import read_peft_folder
    from dora_dist.consolidate import find_adapter

    adapter_folder, base = find_adapter(folder)
    adapter = read_peft_folder(adapter_folder)
    name = str(base or adapter.base_model)
    if not name:
        raise UserError(f"{adapter_folder}: does not name its base model; set base_model_name_or_path in its config")
    base_folder = Path(name) if Path(name).is_dir() else fetch(name)
    placement = WholePlacement(device or "cpu")
    run = build_model(
        base_folder,
        like(adapter),
        placement,
        dtype=dtype,
        task=task_of(adapter.task_type, adapter.model_config),
        trained_modules=adapter.modules_to_save,
        start_from=adapter,
    )
    return run.model, load_tokenizer(base_folder, generative=run.task.name == CAUSAL_LM)
