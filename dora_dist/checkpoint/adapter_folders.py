"""Which adapter a path means, whatever its format, and where the base is that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from dora_dist.adapters import folders, native_format, peft_config
from dora_dist.adapters.adapter_folder import AdapterFolder, SavedAdapter
from dora_dist.adapters.folders import holds_adapter
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.manifest import is_complete
from dora_dist.checkpoint.trained_weights import TrainedWeights, is_trained_weights
from dora_dist.config import is_local
from dora_dist.models.folder import not_a_folder
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.hub import fetch


def open_adapter(path: Path) -> AdapterFolder:
    """As `folders.open_adapter`, and a checkpoint that has no adapter because the base's own weights were trained."""
    return TrainedWeights.open(path) if is_trained_weights(path) else folders.open_adapter(path)


def read_adapter(path: Path) -> SavedAdapter:
    """As `folders.read_adapter`; of a checkpoint without an adapter each tensor is read when it is asked for."""
    return TrainedWeights.open(path).unread() if is_trained_weights(path) else folders.read_adapter(path)


def find_adapter(path: Path) -> tuple[Path, str | None]:
    """The adapter folder that `path` means, or the checkpoint that has none (`open_adapter`), and the base it was
    trained on where that is known.

    `path` is an adapter folder, a checkpoint, or a run folder: then the checkpoint that `run_folder.chosen` takes.
    Raises UserError when it is none of these.
    """
    path = Path(path)
    if holds_adapter(path):
        return path, _trained_on(path)
    if holds_adapter(path / run_folder.ADAPTER):
        if path.name.startswith("checkpoint-") and not is_complete(path):
            raise UserError(f"{path}: incomplete checkpoint (saving was cut short); use another one")
        return path / run_folder.ADAPTER, _trained_on(path / run_folder.ADAPTER, path.parent)
    if is_trained_weights(path):
        return path, _trained_on(path, path.parent) or TrainedWeights.open(path).base_model
    choice = run_folder.chosen(path)
    if choice is None:
        names = " or ".join(folders.CONFIG_NAMES)
        what = "no such folder" if not path.is_dir() else f"no {names} and no complete checkpoint-* in it"
        if (path / "deepspeed.json").is_file():
            what = "a run that has no complete checkpoint yet; wait for its first (checkpoint.save_every), or"
            raise UserError(f"{path}: {what} give another run's folder")
        raise UserError(f"{path}: {what}; give an adapter folder, a checkpoint or a run folder")
    return find_adapter(choice.folder)


def adapter_and_base(path: Path, base: str | None) -> tuple[Path, str]:
    """As `find_adapter`, with the base that is given in the place of the one that is known. UserError where none is."""
    adapter, found = find_adapter(path)
    if base is None and found is None:
        raise UserError(f"{path}: does not say what its base model is; give it with --base MODEL")
    return adapter, base or str(found)


def kept_tokenizer(adapter: Path) -> Path | None:
    """The folder with the tokenizer of what `find_adapter` has found, if that holds one."""
    places = (adapter, adapter / run_folder.TOKENIZER)
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)


def own_tokenizer(adapter: Path) -> Path | None:
    """The same where the run has another tokenizer than its base (model.tokenizer)."""
    named = run_folder.config_of(adapter).get("model", {}).get("tokenizer")
    return kept_tokenizer(adapter) if named else None


def _trained_on(adapter: Path, run: Path | None = None) -> str | None:
    """The base's name: from the run's config.json, else as the adapter says."""
    places: list[tuple[Path, tuple[str, ...]]] = [(run / "config.json", ("model", "path"))] if run else []
    places += [
        (adapter / peft_config.CONFIG_NAME, ("base_model_name_or_path",)),
        (adapter / native_format.CONFIG_NAME, ("base_model",)),
    ]
    for file, keys in places:
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            for key in keys:
                value = value[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(value, str) and value:
            return value
    return None


def base_path(name: str, revision: str | None, named_by: str) -> Path:
    """The folder of the base model `name`: a local one, or a hub name's snapshot.

    `named_by`, the adapter folder or the option that names it, is for messages. Raises UserError where it cannot be
    found or fetched.
    """
    remedy = f"it is the base that {named_by} names: if it was moved, or the name is relative to another working "
    remedy += "directory, give its folder or hub name with --base MODEL"
    if named_by == "--base":
        remedy = "give the folder or hub name of a model with --base"
    if not is_local(name):
        try:
            return fetch(name, revision, field="base model")
        except UserError as error:
            raise UserError(f"{error}\n  {remedy}") from error
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"base model {name!r}: {not_a_folder(folder, remedy)}")
    return folder
