"""Adapter + base -> one plain Hugging Face model folder, streamed: memory stays far below the model's size.

W = (m / n)[:, None]·(W0 + s·B·A), n = row norms of the bracket (DoRA, section 4.1). A row needs only its own
base row, so a tensor is merged in blocks of rows, in fp32, and written as it goes.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_dist.adapters.peft_format import AdapterLayer, PeftFolder, warn_of_lacking, warn_of_magnitudes
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.adapter_folders import base_path
from dora_dist.models.families import family_of
from dora_dist.models.folder import FLOATS, ModelFolder
from dora_dist.runtime import console
from dora_dist.runtime.console import note
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import check_model_output, new_folder
from dora_dist.weights.digest import sampled_digest, warn_of_another_base
from dora_dist.weights.names import Rename, locate, modern, prefix_between, stored_names
from dora_dist.weights.safetensors_io import TensorEntry, TensorFolder, TensorWriter

BLOCK_BYTES = 16 << 20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What makes a folder usable beside its weights; code and pickles are left behind on purpose.
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


@dataclass(frozen=True)
class Output:
    """One tensor to write: its name and dtype there, where it is read, and the module whose update it gets."""

    name: str
    dtype: torch.dtype
    source: TensorFolder
    entry: TensorEntry
    module: str | None = None

    @property
    def nbytes(self) -> int:
        return self.entry.numel * self.dtype.itemsize


@dataclass
class Shard:
    """One output file: its tensors, in the order in which they are read, and their size once written."""

    name: str
    outputs: list[Output]
    nbytes: int


def consolidate(
    adapter_folder: Path,
    base_folder: Path | str,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Merge a PEFT adapter folder into its base and write the folder `output`, config and tokenizer included.

    `base_folder` is a folder or a hub name. `dtype` ("bf16", "fp16", "fp32") of the output is by default that
    of the base on disk, tensor by tensor. Modules that were trained in full replace the base's, or join them; a base
    that is the plain encoder of the adapted model gets that model's names. Where an adapter changes one use of a tied
    weight (modules_to_save=["embed_tokens"]), each use is written on its own, with tie_word_embeddings: false in
    config.json, as PEFT has it. Memory: a few blocks of BLOCK_BYTES, whatever the model's size.
    Returns what was done: output, tensors, merged, shards, bytes_read, bytes_written, seconds.

    Raises UserError, with nothing left behind, when the adapter does not fit the base, a file is damaged, a
    result is not finite, the disk is too small, or `output` exists and `overwrite` is False.
    """
    started = time.monotonic()
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype={dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    adapter = PeftFolder.open(adapter_folder)
    own = str(base_folder) == adapter.config.get("base_model_name_or_path")
    base = base_path(str(base_folder), adapter.config.get("revision") if own else None, str(adapter.path))
    opened = ModelFolder.open(base)
    config, tensors = opened.config, opened.tensors
    output = Path(output).resolve()
    _check_output(output, base, Path(adapter_folder))
    _warn_of_another(adapter, tensors)
    names = _names(adapter, base, config)
    outputs = _outputs(adapter, tensors, dtype, names)
    shards = _plan(outputs, max_shard_bytes)
    if larger := sum(output.nbytes > max_shard_bytes for output in outputs):
        note(f"{larger:,} of {len(outputs):,} tensors are larger than --max-shard-size and get files of their own")
    total = sum(shard.nbytes for shard in shards)
    _check_space(output, total)
    odd: dict[str, int] = {}
    with (
        new_folder(output, overwrite) as folder,
        console.progress(total, "consolidating", "B", unit_scale=True, shown=progress) as bar,
    ):
        _copy_companions(base, folder, config, adapter.model_config, dtype, bool(names.parted))
        for shard in shards:
            layout = [(output.name, output.dtype, output.entry.shape) for output in shard.outputs]
            with TensorWriter(folder / shard.name, layout, {"format": "pt"}) as writer:
                for written in shard.outputs:
                    layer = adapter.layer(written.module) if written.module else None
                    odd[written.name] = layer.odd_magnitudes() if layer else 0
                    for block in _blocks(written, layer):
                        writer.write(written.name, block)
                        bar.update(block.nbytes)
        if len(shards) > 1:
            _write_index(folder, shards)
    warn_of_magnitudes(adapter.path, odd)
    return {
        "output": str(output),
        "tensors": len(outputs),
        "merged": len(adapter.modules),
        "shards": len(shards),
        "bytes_read": tensors.bytes_read,
        "bytes_written": total,
        "seconds": round(time.monotonic() - started, 3),
    }


def merge_rows(weight: Tensor, layer: AdapterLayer, start: int) -> Tensor:
    """Merge `layer` into rows [start, start + len(weight)) of the base weight, fp32 (rows, in), in place.

    Row norms of 0 keep their row (factor 1), as in the layer itself.
    """
    rows = slice(start, start + len(weight))
    if layer.lora_A is not None and layer.lora_B is not None:
        weight.addmm_(layer.lora_B[rows] * layer.scaling, layer.lora_A)
    if layer.magnitude is not None:
        norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)  # squares could overflow in fp32
        factor = torch.where(norm == 0, 1.0, layer.magnitude[rows] / norm)
        weight.mul_(factor[:, None].float())
    return weight


def _check_output(output: Path, base: Path, adapter: Path) -> None:
    """Refuse to replace an input or to write into one, and what a run would take for a checkpoint of its own."""
    if re.fullmatch(r"checkpoint-\d+", output.name):
        raise UserError(f"{output}: is named as a run's checkpoints are, and would be taken for one; give another name")
    inputs = {"base": base, "adapter": adapter}
    if (adapter.resolve().parent / run_folder.MANIFEST).is_file():
        inputs["checkpoint"] = adapter.resolve().parent
    check_model_output(output, inputs)


def _check_space(output: Path, nbytes: int) -> None:
    place = next(folder for folder in output.parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        needed = f"{nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise UserError(f"{output}: disk full: {needed}; free some space or choose another place")


@dataclass(frozen=True)
class _Names:
    """What the base's model knows of its names: `rename` gives today's, for a model made of `parts`; its folder's own
    are what is written all the same. `parted` are the names of each weight of which the adapter changes one use alone.
    """

    rename: Rename | None = None
    parts: tuple[str, ...] = ()
    prefix: str = ""
    parted: tuple[list[str], ...] = ()


def _names(adapter: PeftFolder, base: Path, config: dict[str, Any]) -> _Names:
    # A weight that several modules share is an embedding or a head, never one of the numbered layers.
    outer = [m for m in adapter.modules if not any(part.isdigit() for part in m.split("."))]
    changed = [*adapter.modules_to_save(), *outer]
    family = family_of(config["model_type"])
    if not changed and not family.parts:
        return _Names()
    from dora_dist.models.build import skeleton
    from dora_dist.models.heads import IMAGE_TEXT_TO_TEXT, head_of_adapter
    from dora_dist.models.tying import parted_names

    model = skeleton(base, IMAGE_TEXT_TO_TEXT if family.sees_pictures else head_of_adapter(adapter))
    parted = tuple(names for _, names in parted_names(model, changed))
    return _Names(family.rename(model), family.parts, model.base_model_prefix, parted)


def _entries(tensors: TensorFolder, names: _Names) -> dict[str, TensorEntry]:
    """What the base has, by name there; and again by every other name of what the adapter parts."""
    entries, stored = dict(tensors.entries), stored_names(tensors.entries, names.rename)
    for shared in names.parted:
        found = {name: locate(name, stored, names.prefix) for name in shared}
        if source := next(filter(None, found.values()), None):
            for name in (name for name in shared if not found[name]):
                entries[_own_name(name, tensors.entries, names)] = tensors.entries[source]
    return entries


def _own_name(name: str, entries: Iterable[str], names: _Names) -> str:
    """A name as the folder would have it: older than today's where the others of its part of the model are."""
    there = {own.partition(".")[0] for own in entries}
    older = [f"{part}.{name}" for part in names.parts if part in there]
    return next((own for own in older if names.rename and names.rename(own) == name), name)


def _outputs(adapter: PeftFolder, tensors: TensorFolder, dtype: str | None, names: _Names) -> list[Output]:
    """What to write, in the order of the base's files: its tensors, adapted or replaced, then new ones."""
    entries, rename = _entries(tensors, names), names.rename
    stored = stored_names(entries, rename)
    prefix = prefix_between([f"{module}.weight" for module in adapter.modules], stored)
    targets = _match(adapter, tensors, entries, stored, prefix)
    replaced = {found: name for name in adapter.trained if (found := locate(name, stored, prefix))}
    lacks_prefix = all(not name.startswith(f"{prefix}.") for name in stored)
    outputs = []
    for own, entry in sorted(entries.items(), key=lambda item: (item[1].path, item[1].offset)):
        written_as = _written_as(entry, dtype)
        if own in replaced:
            trained = replaced[own]
            _check_replacement(adapter, trained, entry)
            outputs.append(_trained_output(adapter, trained, own if rename else trained, written_as))
        else:
            name = f"{prefix}.{modern(own)}" if prefix and lacks_prefix else modern(own)
            name = own if rename or own not in tensors.entries else name
            outputs.append(Output(name, written_as, tensors, entry, targets.get(own)))
    usual = next((output.dtype for output in outputs if output.module), outputs[0].dtype)
    return outputs + [_trained_output(adapter, n, n, usual) for n in adapter.trained if n not in replaced.values()]


def _trained_output(adapter: PeftFolder, trained: str, name: str, dtype: torch.dtype) -> Output:
    return Output(name, dtype, adapter.tensors, adapter.tensors.entries[adapter.trained[trained]])


def _check_replacement(adapter: PeftFolder, name: str, entry: TensorEntry) -> None:
    shape = adapter.tensors.entries[adapter.trained[name]].shape
    if shape != entry.shape and not adapter.model_config:  # a head may have another number of labels
        mismatch = f"as {shape}, but {entry.path.parent} has it as {entry.shape}"
        raise UserError(f"{adapter.path}: it trained {name!r} {mismatch}; give the base that it was trained on")


def _match(
    adapter: PeftFolder, tensors: TensorFolder, entries: dict[str, TensorEntry], stored: dict[str, str], prefix: str
) -> dict[str, str]:
    """Name in `entries` -> adapted module. UserError naming the first module that the base cannot take."""
    targets = {}
    for module in adapter.modules:
        weight, who = f"{module}.weight", f"{adapter.path}: it adapts {module!r}"
        own = locate(weight, stored, prefix) or weight
        entry = entries.get(own)
        if entry is None:
            missing = f"but {tensors.path} has no tensor {weight!r}"
            raise UserError(f"{who}, {missing}; give the base that it was trained on")
        if entry.shape != adapter.shape(module):
            mismatch = f"as {adapter.shape(module)}, but {tensors.path} has it as {entry.shape}"
            raise UserError(f"{who} {mismatch}; give the base that it was trained on")
        targets[own] = module
    return targets


def _warn_of_another(adapter: PeftFolder, base: TensorFolder) -> None:
    """Warn where the adapter is of another base, or of more layers than it has tensors for."""
    name = adapter.config.get("base_model_name_or_path") or ""
    warn_of_another_base(adapter.path, name, adapter.base_digest(), base.path, sampled_digest(base))
    weights = [name for name, entry in base.entries.items() if name.endswith(".weight") and len(entry.shape) == 2]
    warn_of_lacking(adapter.path, adapter.lacking(name.removesuffix(".weight") for name in weights))


def _written_as(entry: TensorEntry, dtype: str | None) -> torch.dtype:
    return DTYPES[dtype] if dtype and entry.dtype in FLOATS else entry.dtype


def _plan(outputs: Sequence[Output], max_shard_bytes: float) -> list[Shard]:
    """Fill files up to `max_shard_bytes` each, in the order of `outputs`: the base is read sequentially."""
    shards: list[Shard] = []
    for output in outputs:
        if not shards or shards[-1].nbytes + output.nbytes > max_shard_bytes:
            shards.append(Shard("model.safetensors", [], 0))
        shards[-1].outputs.append(output)
        shards[-1].nbytes += output.nbytes
    if len(shards) > 1:
        for number, shard in enumerate(shards, 1):
            shard.name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


def _blocks(output: Output, layer: AdapterLayer | None) -> Iterator[Tensor]:
    """The tensor as it is to be written, a block of rows at a time; UserError if a number is not finite."""
    entry, dtype, source = output.entry, output.dtype, output.source
    rows = entry.shape[0] if entry.shape else 1
    width = entry.numel // rows if rows else 0
    step = max(1, BLOCK_BYTES // (4 * max(width, 1)))
    for start in range(0, rows, step):
        span = (start * width, min(start + step, rows) * width)
        if layer is None:
            block = source.read_flat(entry.name, *span, dtype=dtype)
        else:
            weight = source.read_flat(entry.name, *span, dtype=torch.float32).view(-1, width)
            block = merge_rows(weight, layer, start).to(dtype)
        if block.is_floating_point() and dtype.itemsize > 1 and not bool(torch.isfinite(block).all()):
            origin = "source" if layer is None else "base, adapter or their sum"
            cause = f"its {origin} holds NaN, infinity or a value too large for {dtype}"
            raise UserError(f"tensor {output.name!r} would not be finite: {cause}; try --dtype bf16 or fp32, or fix it")
        yield block


def _copy_companions(
    base: Path, folder: Path, config: dict[str, Any], model_config: dict[str, Any], dtype: str | None, untied: bool
) -> None:
    """Configuration, tokenizer and licence files; in the config, the weights' new dtype, the new head if any, and that
    a head is not the embedding any more.
    """
    for file in sorted(base.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in (*_CONFIGURATION, *_TOKENIZER)):
            shutil.copyfile(file, folder / file.name)
    if dtype:
        for section in (config, *(part for part in config.values() if isinstance(part, dict))):
            key = "dtype" if "dtype" in section else "torch_dtype"
            if key in section or section is config:
                section[key] = str(DTYPES[dtype]).removeprefix("torch.")
    if untied:
        for section in (config, *([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])):
            section["tie_word_embeddings"] = False
    if dtype or model_config or untied:
        config.update(model_config)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_index(folder: Path, shards: list[Shard]) -> None:
    weight_map = {output.name: shard.name for shard in shards for output in shard.outputs}
    metadata = {"total_size": sum(shard.nbytes for shard in shards)}
    index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
