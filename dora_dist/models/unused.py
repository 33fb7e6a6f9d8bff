"""Says which tensors of a folder its model does not read: a model without some of its weights is another model."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dora_dist.models.folder import ModelFolder
from dora_dist.runtime.console import note, warn
from dora_dist.weights.names import locate

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks?)\.(\d+)\.")
_SHOWN = 3


def report_unused(folder: ModelFolder, model: Any, stored: Mapping[str, str]) -> None:
    """Say which tensors of `folder` (`stored`: `stored_names`) no parameter or buffer of `model` is read from."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    used = {locate(name, stored, model.base_model_prefix) for name in names}
    say_unused(folder, [own for own in stored.values() if own not in used], model)


def say_unused(folder: ModelFolder, unused: Iterable[str], model: Any) -> None:
    """Warn of `unused` tensors in numbered layers; note others, such as the head of another task.

    Left out are those that transformers knows to be of no use to this model, such as old buffers.
    """
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    left = [name for name in unused if not any(re.search(pattern, name) for pattern in known)]
    inner = [name for name in left if _LAYER.search(name)]
    if inner:
        warn(f"{folder.path}: {_listed(inner)} not used{_layers(folder, inner, model)}, as in transformers")
    if outer := [name for name in left if name not in inner]:
        note(f"{folder.path}: {_listed(outer)} not used by {type(model).__name__}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def _layers(folder: ModelFolder, names: Sequence[str], model: Any) -> str:
    """Why, where config.json has fewer layers than the files."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    last = max(int(found[1]) for name in names if (found := _LAYER.search(name)))
    if count is None or last < count:
        return f": {folder.path / 'config.json'} describes a model without"
    return f": {folder.path / 'config.json'} has num_hidden_layers = {count}, the files have {last + 1} layers"
