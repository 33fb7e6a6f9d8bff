"""A model to ask questions of, in one process: plain, or with an adapter on its base."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dora_dist.adapters.adapter_folder import packed_in_training, storage_in_training
from dora_dist.adapters.folders import holds_adapter
from dora_dist.adapters.inject import like
from dora_dist.adapters.patterns import outside
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.adapter_folders import base_path, find_adapter, kept_tokenizer, open_adapter, read_adapter
from dora_dist.checkpoint.trained_weights import is_trained_weights
from dora_dist.config import RunConfig
from dora_dist.models.build import DTYPES, build_model
from dora_dist.models.folder import (
    GENERATION_CONFIG,
    ModelFolder,
    generation_config,
    not_a_folder,
    read_config,
    transformers_config,
)
from dora_dist.models.heads import Head, head_of_adapter, head_of_model
from dora_dist.models.reading import read_model
from dora_dist.models.tokenizer import load_tokenizer
from dora_dist.models.unused import say_unused
from dora_dist.models.vocabulary import refuse_tokens_without_rows
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.hub import fetch
from dora_dist.tasks import problems
from dora_dist.weights.placement import WholePlacement
from dora_dist.weights.safetensors_io import TensorFolder


def load_for_inference(path: str, dtype: str = "bf16", base: str | None = None) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, on the accelerator if there is one.

    `path` is the Hugging Face folder or hub name of a model of one of our tasks, or else an adapter folder, a
    checkpoint or a run folder, whose adapter is then put on its base unmerged, for the task that it was trained for; on
    `base` (a folder or hub name) where that is given. Raises UserError if it is none of these, and later, from the
    model's forward, where its logits are NaN or infinite.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    adapter = adapter_at(path)
    folder = base_folder(path, base)
    model = _plain(folder, dtype) if adapter is None else _adapted(adapter, folder, dtype, device)
    tokenizer = tokenizer_at(path, base)
    refuse_tokens_without_rows(model, tokenizer, folder)
    head_at(path).fit(model, tokenizer)
    model.config.use_cache = True
    if head := model.get_output_embeddings():
        head.register_forward_pre_hook(_contiguous)
    model.register_forward_hook(_FiniteLogits(path, dtype))
    return model.to(device).eval().requires_grad_(False), tokenizer


def _plain(folder: Path, dtype: str) -> Any:
    """A whole model, read by transformers, which would make up what is missing and only say so in its log."""
    opened = ModelFolder.open(folder)
    head = head_of_model(opened.config)
    head.model_class(transformers_config(folder))
    if (folder / GENERATION_CONFIG).exists():
        generation_config(folder)
    model, unused = read_model(opened, head.reading_class(), dtype=DTYPES[dtype])
    say_unused(opened, unused, model)
    return model


def tokenizer_at(path: str, base: str | None = None) -> Any:
    """The tokenizer of the model that `load_for_inference` would load."""
    return load_tokenizer(tokenizer_source(path, base), generative=head_at(path).generative)


def tokenizer_source(path: str, base: str | None = None) -> str | Path:
    """What that tokenizer is read from: the adapter folder or the checkpoint where it holds one, else what its run
    names, else the base's folder."""
    adapter = adapter_at(path)
    run = run_folder.config_of(adapter).get("model", {}) if adapter else {}
    kept = kept_tokenizer(adapter) if adapter else None
    return kept or run.get("tokenizer") or base_folder(path, base)


def head_at(path: str) -> Head:
    """The head of the model that `load_for_inference` would load. Raises UserError as that does."""
    adapter = adapter_at(path)
    return head_of_model(read_config(_folder(path))) if adapter is None else head_of_adapter(open_adapter(adapter))


def base_folder(path: str, base: str | None = None) -> Path:
    """The folder of the plain model that `load_for_inference` would load, alone or under an adapter."""
    adapter = adapter_at(path)
    if adapter is not None:
        return _base_of(adapter, base)
    if base is not None:
        raise UserError(f"--base {base}: {path} is a whole model, which needs no base; leave it out")
    return _folder(path)


def adapter_at(path: str) -> Path | None:
    """The adapter folder that `path` means; None if it is a plain model. Raises UserError if it is neither."""
    folder = _folder(path)
    is_adapters = any(map(holds_adapter, (folder, folder / run_folder.ADAPTER))) or is_trained_weights(folder)
    if any(folder.glob("*.safetensors")) and not is_adapters:  # a checkpoint has its state in such a file, too
        return None
    if any(folder.glob("*.bin")) and not is_adapters:
        TensorFolder.open(folder)  # refuses pickles
    return find_adapter(folder)[0]


def run_of(path: str) -> dict[str, Any]:
    """The configuration of the run that the adapter at `path` was trained in; {} for any other model."""
    adapter = adapter_at(path)
    return run_folder.config_of(adapter) if adapter else {}


class EvaluatedModel:
    """What can be known of a model before `load` reads its weights; each is looked up when it is first asked for."""

    def __init__(self, path: str, base: str | None) -> None:
        """base: folder or hub name of the model under an adapter, in place of what the run or the adapter names."""
        self.path, self._base = path, base

    @cached_property
    def head(self) -> Head:
        return head_at(self.path)

    @cached_property
    def run(self) -> dict[str, Any]:
        return run_of(self.path)

    @cached_property
    def base(self) -> Path:
        return base_folder(self.path, self._base)

    @cached_property
    def tokenizer_source(self) -> str | Path:
        return tokenizer_source(self.path, self._base)

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_at(self.path, self._base)

    def configuration(self, sections: dict[str, Any]) -> RunConfig:
        return RunConfig.from_dict(sections, origin="the evaluation", rules=problems)

    def load(self, dtype: str) -> Any:
        """The model in evaluation mode (see `load_for_inference`)."""
        return load_for_inference(self.path, dtype, self._base)[0]


class _FiniteLogits:
    """A forward hook: answers read from NaN would look like answers. Waits for the device once per forward."""

    def __init__(self, path: str, dtype: str) -> None:
        narrow = "its numbers may be too large for fp16: try --dtype bf16 or fp32; or " if dtype == "fp16" else ""
        self._message = (
            f"{path}: the model's logits are NaN or infinite, so no answer of it means anything; {narrow}look at its "
            "weights and its adapter's (a run that diverged?), or evaluate an earlier checkpoint"
        )

    def __call__(self, model: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        for name, values in outputs.items() if isinstance(outputs, dict) else ():  # custom code may give a tuple
            # The largest is NaN if any is; single logits of minus infinity are how some models forbid a token.
            if name.endswith("logits") and values.numel() and not torch.isfinite(values.amax()):
                raise UserError(self._message)


def _contiguous(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Generation passes on a slice, the last position of each sequence; torch would copy the weight for each one."""
    return tuple(values.contiguous() for values in inputs)


def _folder(path: str) -> Path:
    from dora_dist.config import is_local

    folder = Path(path) if is_local(path) else fetch(path)
    if not folder.is_dir():
        remedy = "give a model, adapter, checkpoint or run folder, or a hub name"
        raise UserError(f"{path}: {not_a_folder(folder, remedy)}")
    return folder


def _adapted(folder: Path, base: Path, dtype: str, device: torch.device | None) -> Any:
    adapter, opened = read_adapter(folder), open_adapter(folder)
    head = head_of_adapter(opened)
    placement = WholePlacement(device or "cpu")
    single = outside(adapter.trained, adapter.modules_to_save)
    packed = packed_in_training(opened)
    run = build_model(
        base,
        like(adapter),
        placement,
        dtype=dtype,
        head=head,
        trained_modules=adapter.modules_to_save,
        trained_parameters=lambda model: single,
        start_from=adapter,
        storage=storage_in_training(opened),
        packed=lambda model: packed,
    )
    return run.model


def _base_of(adapter: Path, given: str | None) -> Path:
    """The folder of the base: `given`, else as the run says, else as the adapter says."""
    own, run = open_adapter(adapter), run_folder.config_of(adapter).get("model", {})
    if given is not None:
        return base_path(given, None, "--base")
    name = run.get("path") or own.base_model
    if not name:
        raise UserError(f"{adapter}: does not say what its base model is; give it with --base MODEL")
    return base_path(name, run.get("revision") if run.get("path") else own.revision, str(adapter))
