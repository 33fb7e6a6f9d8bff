"""A whole model as transformers reads it, with nothing made up for what its folder lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dora_dist.models.folder import ModelFolder, reason
from dora_dist.runtime.errors import UserError
from dora_dist.weights.loading import is_finite


def read_model(
    opened: ModelFolder, model_class: Any, *, dtype: torch.dtype, config: Any = None
) -> tuple[Any, list[str]]:
    """A model of `model_class` with the weights of a folder, and the names of those tensors that it does not read.

    config: of transformers, in place of the folder's own. transformers would fill what is missing with random numbers
    and only say so in its log: here a tensor that is missing, has another shape or is not finite raises UserError.
    """
    folder = opened.path
    try:
        with _quiet():
            model, report = model_class.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **({} if config is None else {"config": config}),
            )
    except Exception as error:  # each family checks its fields in its own way
        raise UserError(f"{folder}: transformers cannot load it: {reason(error)}") from error
    doubt = "is this folder the model that its config.json describes?"
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} in all); {doubt}")
    for name, there, here in sorted(report["mismatched_keys"]):
        raise UserError(f"{folder}: tensor {name!r} has shape {list(there)}, the model needs {list(here)}; {doubt}")
    if damaged := [name for name, values in model.named_parameters() if not is_finite(values)]:
        raise UserError(f"{folder}: tensor {damaged[0]!r} holds NaN or infinity; download or copy the folder again")
    return model, sorted(report["unexpected_keys"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of tensors: the errors here say what is in it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
