"""The tensors of an adapter and its base, merged a block of rows at a time, and the configuration that fits them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dora_dist.adapters.adapter_folder import AdapterFolder, SavedLayer
from dora_dist.adapters.peft_folder import warn_of_lacking
from dora_dist.adapters.storage import PLAIN, WeightStorage
from dora_dist.checkpoint.merge_plan import Output
from dora_dist.checkpoint.merging import row_blocks, trained_on, warn_of_another
from dora_dist.models.folder import DTYPES
from dora_dist.runtime.errors import UserError
from dora_dist.weights.safetensors_io import TensorFolder


@dataclass
class Merger:
    """Makes the merged tensors of an adapter that was trained on a base in `storage`: of that, or of the base's own
    weights (`original`). Without an adapter, tensors are as their folder has them.
    """

    adapter: AdapterFolder | None
    storage: WeightStorage
    original: bool
    remedy: str = "try --dtype bf16 or fp32"
    differences: dict[str, float] = field(default_factory=dict)
    odd: dict[str, int] = field(default_factory=dict)

    def blocks(self, output: Output) -> Iterator[Tensor]:
        """The tensor as it is to be written, a block of rows at a time, flat where nothing is merged into it.

        `odd` gets how many odd magnitudes its update has. UserError, with `remedy`, if a number is not finite.
        """
        layer = self.adapter.layer(output.module) if self.adapter and output.module else None
        self.odd[output.name] = layer.odd_magnitudes() if layer else 0
        dtype, held_by = output.dtype, trained_on(output, self.storage)
        if self.original and output.packed:
            blocks = self._compared(output, layer)
        elif held_by is None:
            blocks = (block for _, block in row_blocks(output))
        else:
            blocks = _merged(output, layer, held_by)
        for block in blocks:
            block = block.to(dtype)
            if block.is_floating_point() and dtype.itemsize > 1 and not bool(torch.isfinite(block).all()):
                origin = "source" if layer is None else "base, adapter or their sum"
                cause = f"its {origin} holds NaN, infinity or a value too large for {dtype}"
                raise UserError(f"tensor {output.name!r} would not be finite: {cause}; {self.remedy}, or fix it")
            yield block

    def _compared(self, output: Output, layer: SavedLayer | None) -> Iterator[Tensor]:
        """Of the base's own weight; `differences` gets how far that is from what training saw."""
        apart = whole = 0.0
        both = zip(_merged(output, layer, PLAIN), _merged(output, layer, self.storage), strict=True)
        for own, seen in both:
            apart += float((own - seen).double().square().sum())
            whole += float(seen.double().square().sum())
            yield own
        self.differences[output.name] = math.sqrt(apart / whole) if whole else 0.0


def _merged(output: Output, layer: SavedLayer | None, held_by: WeightStorage) -> Iterator[Tensor]:
    """Blocks of rows (rows, in), fp32, of a weight as `held_by` has it, with the layer's update."""
    for start, block in row_blocks(output, held_by):
        if layer is not None:
            layer.merge_rows(block, start)
        yield block


def merged_config(
    config: Mapping[str, Any], model_config: Mapping[str, Any], *, dtype: str | None, untied: bool
) -> dict[str, Any]:
    """The base's `config` where it does not hold any more: the weights' new `dtype`, the new head's fields
    (`model_config`), and that a head is not the embedding any more (`untied`).
    """
    merged: dict[str, Any] = deepcopy(dict(config))
    if dtype:
        for section in (merged, *(part for part in merged.values() if isinstance(part, dict))):
            key = "dtype" if "dtype" in section else "torch_dtype"
            if key in section or section is merged:
                section[key] = str(DTYPES[dtype]).removeprefix("torch.")
    if untied:
        for section in (merged, *([merged["text_config"]] if isinstance(merged.get("text_config"), dict) else [])):
            section["tie_word_embeddings"] = False
    return {**merged, **model_config}


def warn_of_misfit(adapter: AdapterFolder, base: TensorFolder) -> None:
    """Warn where the adapter is of another base, or of more layers than it has tensors for."""
    warn_of_another(adapter, base)
    weights = [name for name, entry in base.entries.items() if name.endswith(".weight") and len(entry.shape) == 2]
    warn_of_lacking(adapter.path, adapter.lacking(name.removesuffix(".weight") for name in weights))
