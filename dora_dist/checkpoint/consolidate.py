"""Adapter + base -> one plain Hugging Face model folder, streamed: memory stays far below the model's size.

W = (m / n)[:, None]·(W0 + s·B·A), n = row norms of the bracket (DoRA, section 4.1). A row needs only its own
base row, so a tensor is merged in blocks of rows, in fp32, and written as it goes: memory is a few such blocks.

Modules that were trained in full replace the base's, or join them; a base that is the plain encoder of the adapted
model gets that model's names. Where an adapter changes one use of a tied weight (modules_to_save=["embed_tokens"]),
each use is written on its own, with tie_word_embeddings: false in config.json, as PEFT has it.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dora_dist.adapters.adapter_folder import AdapterFolder, SavedLayer
from dora_dist.adapters.peft_folder import warn_of_lacking, warn_of_magnitudes
from dora_dist.adapters.storage import PLAIN, WeightStorage, labelled
from dora_dist.checkpoint.adapter_folders import open_adapter, own_tokenizer
from dora_dist.checkpoint.merge_plan import Output, Shard, plan_merge
from dora_dist.checkpoint.merging import check_place, open_base, row_blocks, trained_on
from dora_dist.checkpoint.model_card import about_adapter, add_card
from dora_dist.models.folder import DTYPES
from dora_dist.runtime import console
from dora_dist.runtime.console import note
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import MODEL_MARKS, new_folder
from dora_dist.weights.digest import sampled_digest, warn_of_another_base
from dora_dist.weights.safetensors_io import TensorFolder, TensorWriter

BasePrecision = Literal["trained", "original"]

# What makes a folder usable besides its weights; code and pickles are left behind on purpose.
_CONFIGURATION = ("config.json", "generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*")
_TOKENIZER = (
    "*token*.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
)


def consolidate(
    adapter_folder: Path,
    base_folder: Path | str,
    output: Path,
    *,
    dtype: str | None = None,
    base_precision: BasePrecision = "trained",
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Merge an adapter folder into its base and write a plain model folder, config and tokenizer included: the base's
    tokenizer, or the one that a run was given in its place.

    Args:
        adapter_folder: PEFT's format or our own; of a run `RUN_DIR/checkpoint-STEP/adapter`.
        base_folder: a folder, or a hub name.
        output: the folder to write; it appears under its name once it is complete.
        dtype: "bf16", "fp16" or "fp32"; None: that of the base on disk, tensor by tensor.
        base_precision: "trained": the base is what training saw, in a quantised run its weights decoded; "original":
            the base's own weights, and `differences` says how far the result is from the other.
        max_shard_bytes: the size of one .safetensors file; a larger tensor gets a file of its own.

    Returns: what was done: output, tensors, merged, shards, bytes_read, bytes_written, seconds, differences (by tensor:
        ‖merged − as training saw it‖ / ‖as training saw it‖, Frobenius, of every weight that a packed storage held;
        empty unless `base_precision` is "original").

    Raises UserError, with nothing left behind, when the adapter does not fit the base, a file is damaged, a result is
    not finite, the disk is too small, or `output` exists and `overwrite` is False.

    Example::

        consolidate(checkpoint / "adapter", "base", Path("merged"), dtype="bf16")
    """
    started = time.monotonic()
    if base_precision not in get_args(BasePrecision):
        choices = ", ".join(get_args(BasePrecision))
        raise UserError(f"base_precision={base_precision!r} is not supported; choose one of {choices}")
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype={dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    adapter = open_adapter(adapter_folder)
    storage = labelled(adapter.base_storage(), f"{adapter.path}: the base's storage")
    base = open_base(adapter, str(base_folder))
    output = Path(output).resolve()
    check_place(output, base.path, Path(adapter_folder), what="a model", marks=MODEL_MARKS)
    _warn_of_another(adapter, base.tensors)
    plan = plan_merge(adapter, base, dtype)
    adapter = adapter.of_base(plan.adapted)
    shards = plan.shards(max_shard_bytes)
    if larger := sum(output.nbytes > max_shard_bytes for output in plan.outputs):
        note(f"{larger:,} of {len(plan.outputs):,} tensors are larger than --max-shard-size and get files of their own")
    total = sum(shard.nbytes for shard in shards)
    _check_space(output, total)
    with (
        new_folder(output, overwrite) as folder,
        console.progress(total, "consolidating", "B", unit_scale=True, shown=progress) as bar,
    ):
        _copy_companions(base.path, folder, tokenizer=own_tokenizer(Path(adapter_folder)) or base.path)
        _write_config(folder, base.config, adapter.model_config, dtype=dtype, untied=plan.untied)
        merger = _Merger(adapter, storage, base_precision == "original")
        odd = _write_weights(folder, shards, merger, bar=bar)
        add_card(folder, about_adapter(adapter), replaced=output)
    warn_of_magnitudes(adapter.path, odd)
    return {
        "output": str(output),
        "tensors": len(plan.outputs),
        "merged": len(adapter.modules),
        "replaced": len(adapter.trained),
        "shards": len(shards),
        "bytes_read": base.tensors.bytes_read,
        "bytes_written": total,
        "differences": merger.differences,
        "seconds": round(time.monotonic() - started, 3),
    }


def _check_space(output: Path, nbytes: int) -> None:
    place = next(folder for folder in output.parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        needed = f"{nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise UserError(f"{output}: disk full: {needed}; free some space or choose another place")


def _warn_of_another(adapter: AdapterFolder, base: TensorFolder) -> None:
    """Warn where the adapter is of another base, or of more layers than it has tensors for."""
    warn_of_another_base(adapter.path, adapter.base_model, adapter.base_digest(), base.path, sampled_digest(base))
    weights = [name for name, entry in base.entries.items() if name.endswith(".weight") and len(entry.shape) == 2]
    warn_of_lacking(adapter.path, adapter.lacking(name.removesuffix(".weight") for name in weights))


@dataclass
class _Merger:
    """Makes the merged tensors of an adapter that was trained on a base in `storage`: of that, or of the base's own
    weights (`original`).
    """

    adapter: AdapterFolder
    storage: WeightStorage
    original: bool
    differences: dict[str, float] = field(default_factory=dict)

    def layer(self, output: Output) -> SavedLayer | None:
        return self.adapter.layer(output.module) if output.module else None

    def blocks(self, output: Output, layer: SavedLayer | None) -> Iterator[Tensor]:
        """The tensor as it is to be written, a block of rows at a time; UserError if a number is not finite."""
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
                raise UserError(
                    f"tensor {output.name!r} would not be finite: {cause}; try --dtype bf16 or fp32, or fix it"
                )
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


def _copy_companions(base: Path, folder: Path, *, tokenizer: Path) -> None:
    """Configuration and licence files of the base, and the files of the folder `tokenizer` that are a tokenizer's."""
    for place, patterns in ((base, _CONFIGURATION), (tokenizer, _TOKENIZER)):
        for file in sorted(place.iterdir()):
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns):
                shutil.copyfile(file, folder / file.name)


def _write_config(
    folder: Path, config: dict[str, Any], model_config: Mapping[str, Any], *, dtype: str | None, untied: bool
) -> None:
    """Write the base's `config` where it does not hold any more: the weights' new `dtype`, the new head's fields
    (`model_config`), and that a head is not the embedding any more (`untied`).
    """
    if not (dtype or model_config or untied):
        return
    if dtype:
        for section in (config, *(part for part in config.values() if isinstance(part, dict))):
            key = "dtype" if "dtype" in section else "torch_dtype"
            if key in section or section is config:
                section[key] = str(DTYPES[dtype]).removeprefix("torch.")
    if untied:
        for section in (config, *([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])):
            section["tie_word_embeddings"] = False
    written = json.dumps({**config, **model_config}, indent=2)
    (folder / "config.json").write_text(written + "\n", encoding="utf-8")


def _write_weights(folder: Path, shards: Sequence[Shard], merger: _Merger, *, bar: Any) -> dict[str, int]:
    """Read, merge and write every tensor, and the index where there are several files.

    Returns how many odd magnitudes each tensor's update has.
    """
    odd: dict[str, int] = {}
    for shard in shards:
        layout = [(output.name, output.dtype, output.entry.shape) for output in shard.outputs]
        with TensorWriter(folder / shard.name, layout, {"format": "pt"}) as writer:
            for output in shard.outputs:
                layer = merger.layer(output)
                odd[output.name] = layer.odd_magnitudes() if layer else 0
                for block in merger.blocks(output, layer):
                    writer.write(output.name, block)
                    bar.update(block.nbytes)
    if len(shards) > 1:
        _write_index(folder, shards)
    return odd


def _write_index(folder: Path, shards: Sequence[Shard]) -> None:
    weight_map = {output.name: shard.name for shard in shards for output in shard.outputs}
    metadata = {"total_size": sum(shard.nbytes for shard in shards)}
    index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
