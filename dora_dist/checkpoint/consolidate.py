"""Adapter + base -> one plain Hugging Face model folder, streamed: memory stays far below the model's size.

W = (m / n)[:, None]·(W0 + s·B·A), n = row norms of the bracket (DoRA, section 4.1). A row needs only its own
base row, so a tensor is merged in blocks of rows, in fp32, and written as it goes: memory is a few such blocks.

Modules that were trained in full replace the base's, or join them; a base that is the plain encoder of the adapted
model gets that model's names. Where an adapter changes one use of a tied weight (modules_to_save=["embed_tokens"]),
each use is written on its own, with tie_word_embeddings: false in config.json, as PEFT has it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args

from dora_dist.adapters.adapter_folder import storage_in_training
from dora_dist.adapters.peft_folder import warn_of_magnitudes
from dora_dist.checkpoint.adapter_folders import open_adapter, own_tokenizer
from dora_dist.checkpoint.merge_plan import MergePlan, Shard, plan_merge
from dora_dist.checkpoint.merger import Merger, merged_config, warn_of_misfit
from dora_dist.checkpoint.merging import check_place, check_space, open_base
from dora_dist.checkpoint.model_card import about_adapter, add_card
from dora_dist.models.folder import DTYPES
from dora_dist.runtime import console
from dora_dist.runtime.console import note
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import MODEL_MARKS, TOKENIZER_FILES, new_folder
from dora_dist.weights.safetensors_io import TensorWriter

BasePrecision = Literal["trained", "original"]

# What makes a folder usable besides its weights; code and pickles are left behind on purpose.
_CONFIGURATION = ("config.json", "generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*")


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

    Returns: what was done: output, tensors, merged, replaced, shards, bytes_read, bytes_written, seconds, differences
        (by tensor: ‖merged − as training saw it‖ / ‖as training saw it‖, Frobenius, of every weight that a packed
        storage held; empty unless `base_precision` is "original").

    Raises UserError, with nothing left behind, when the adapter does not fit the base, a file is damaged, a result is
    not finite, the disk is too small, or `output` exists and `overwrite` is False.

    Example::

        consolidate(checkpoint / "adapter", "base", Path("merged"), dtype="bf16")
    """
    started = time.monotonic()
    _check_choices(dtype, base_precision)
    adapter = open_adapter(adapter_folder)
    storage = storage_in_training(adapter)
    base = open_base(adapter, str(base_folder))
    output = Path(output).resolve()
    check_place(output, base.path, Path(adapter_folder), what="a model", marks=MODEL_MARKS)
    warn_of_misfit(adapter, base.tensors)
    plan = plan_merge(adapter, base, dtype)
    adapter = adapter.of_base(plan.adapted)
    shards = _files(plan, max_shard_bytes)
    total = sum(shard.nbytes for shard in shards)
    check_space(output, total)
    with (
        new_folder(output, overwrite) as folder,
        console.progress(total, "consolidating", "B", unit_scale=True, shown=progress) as bar,
    ):
        _copy_companions(base.path, folder, tokenizer=own_tokenizer(Path(adapter_folder)) or base.path)
        _write_config(folder, base.config, adapter.model_config, dtype=dtype, untied=plan.untied)
        merger = Merger(adapter, storage, base_precision == "original")
        _write_weights(folder, shards, merger, bar=bar)
        add_card(folder, about_adapter(adapter), replaced=output)
    warn_of_magnitudes(adapter.path, merger.odd)
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


def _check_choices(dtype: str | None, base_precision: str) -> None:
    if base_precision not in get_args(BasePrecision):
        choices = ", ".join(get_args(BasePrecision))
        raise UserError(f"base_precision={base_precision!r} is not supported; choose one of {choices}")
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype={dtype!r} is not supported; choose one of {', '.join(DTYPES)}")


def _files(plan: MergePlan, max_shard_bytes: float) -> list[Shard]:
    if larger := sum(output.nbytes > max_shard_bytes for output in plan.outputs):
        note(f"{larger:,} of {len(plan.outputs):,} tensors are larger than --max-shard-size and get files of their own")
    return plan.shards(max_shard_bytes)


def _copy_companions(base: Path, folder: Path, *, tokenizer: Path) -> None:
    """Configuration and licence files of the base, and the files of the folder `tokenizer` that are a tokenizer's."""
    for place, patterns in ((base, _CONFIGURATION), (tokenizer, TOKENIZER_FILES)):
        for file in sorted(place.iterdir()):
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns):
                shutil.copyfile(file, folder / file.name)


def _write_config(
    folder: Path, config: dict[str, Any], model_config: Mapping[str, Any], *, dtype: str | None, untied: bool
) -> None:
    """Write what `merged_config` says where the copied config.json does not hold any more."""
    if dtype or model_config or untied:
        written = json.dumps(merged_config(config, model_config, dtype=dtype, untied=untied), indent=2)
        (folder / "config.json").write_text(written + "\n", encoding="utf-8")


def _write_weights(folder: Path, shards: Sequence[Shard], merger: Merger, *, bar: Any) -> None:
    """Read, merge and write every tensor, and the index where there are several files."""
    for shard in shards:
        layout = [(output.name, output.dtype, output.entry.shape) for output in shard.outputs]
        with TensorWriter(folder / shard.name, layout, {"format": "pt"}) as writer:
            for output in shard.outputs:
                for block in merger.blocks(output):
                    writer.write(output.name, block)
                    bar.update(block.nbytes)
    if len(shards) > 1:
        _write_index(folder, shards)


def _write_index(folder: Path, shards: Sequence[Shard]) -> None:
    weight_map = {output.name: shard.name for shard in shards for output in shard.outputs}
    metadata = {"total_size": sum(shard.nbytes for shard in shards)}
    index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
