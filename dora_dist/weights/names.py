"""A parameter's name in a model and in the folder that it is read from, where the two differ."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dora_dist.runtime.errors import UserError

Rename = Callable[[str], str]
"""A tensor's name in a folder -> its name in today's model."""


def stored_names(names: Iterable[str], rename: Rename | None = None) -> dict[str, str]:
    """Today's name of each tensor of a folder -> its name there; by `modern` unless a model's own `rename` is given."""
    return {(rename or modern)(name): name for name in names}


def rename_for(model: Any) -> Rename:
    """How a model's folders, old and new, name its parameters, as transformers knows it.

    The parts of a composite model have had other names in other versions (LLaVA's "language_model.model.layers" is
    "model.language_model.layers" today). Renaming raises UserError for a tensor that is stored in another form, too.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters: list[Any] = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings: list[Any] = [t for t in transforms if not isinstance(t, WeightConverter)]

    def rename(name: str) -> str:
        today, converted = rename_source_key(name, renamings, converters)
        if converted is not None:
            raise UserError(
                f"model.path: tensor {name!r} is stored in a form that is not read in place; load the model with "
                "transformers and save it with save_pretrained(save_original_format=False)"
            )
        return today

    return rename


def modern(name: str) -> str:
    """LayerNorms of old encoder checkpoints call their weight gamma and their bias beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def locate(name: str, stored: Mapping[str, str], prefix: str) -> str | None:
    """The tensor in a folder (`stored_names`) that parameter `name` is read from, None if it is not there.

    A plain encoder's folder lacks the `prefix` ("bert") under which a model with a head holds that encoder, and a
    folder of a model with a head has it where a plain encoder's parameters do not.
    """
    candidates = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else [name]
    return next((stored[candidate] for candidate in candidates if candidate in stored), None)


def prefix_between(names: Iterable[str], stored: Mapping[str, str]) -> str:
    """The prefix that model parameters `names` and a folder's tensors differ by; "" if they agree, or in more."""
    tops = {name.partition(".")[0] for name in stored}
    for name in names:
        if name in stored:
            return ""
        if name.partition(".")[2] in stored:
            return name.partition(".")[0]
        for top in sorted(tops):
            if f"{top}.{name}" in stored:
                return top
    return ""
