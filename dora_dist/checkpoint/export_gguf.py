"""A run, an adapter or a plain model as one GGUF file, for llama.cpp: merged and written a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dora_dist.adapters.adapter_folder import storage_in_training
from dora_dist.adapters.folders import holds_adapter
from dora_dist.adapters.peft_folder import warn_of_magnitudes
from dora_dist.adapters.storage import PLAIN
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.adapter_folders import adapter_and_base, open_adapter, own_tokenizer
from dora_dist.checkpoint.merge_plan import Output, plan_merge
from dora_dist.checkpoint.merger import Merger, merged_config, warn_of_misfit
from dora_dist.checkpoint.merging import check_place, check_space, open_base
from dora_dist.checkpoint.trained_weights import is_trained_weights
from dora_dist.models.folder import ModelFolder
from dora_dist.models.gguf_layout import Layout
from dora_dist.models.gguf_vocabulary import Vocabulary, vocabulary_of
from dora_dist.models.tokenizer import load_tokenizer
from dora_dist.runtime import console, extras
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import DISK_IS_FULL, check_output, disk_errors, fsync, new_file
from dora_dist.weights.names import modern

TYPES = ("f32", "f16", "bf16", "q8_0")
"""Of weights, as llama.cpp calls them; vectors are f32 in all."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_REMEDY = "try --type bf16 or f32"
_BLOCK = 32  # numbers that share a scale in q8_0


def export_gguf(
    path: str | Path,
    output: Path,
    *,
    gguf_type: str = "f16",
    base: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a causal language model of LLaMA's architecture as the file `output`, with its tokenizer.

    Args:
        path: a run, a checkpoint or an adapter folder, which is merged into its base; or the folder of a plain model,
            such as `consolidate` writes.
        output: the file; it appears under its name once it is complete.
        gguf_type: one of TYPES. Sums of base and adapter are rounded to it from fp32. q8_0 is 8 bit with a scale per 32
            numbers; a weight whose rows are not a multiple of 32 is f16 in its place.
        base: folder or hub name of the base; None: as the run, or else the adapter, says.

    Returns: {"output", "tensors", "merged": adapted weights, "bytes_written", "in_f16": tensors that are not q8_0}.

    Raises UserError, with nothing left behind, for a model or tokenizer that llama.cpp would compute in another way, a
    result that `gguf_type` cannot hold, and an `output` that exists unless `overwrite`.

    Memory: a few blocks of rows, the vocabulary, and the largest adapted layer's own tensors.

    Example::

        export_gguf("runs/mine", Path("mine.gguf"), gguf_type="q8_0")
    """
    if gguf_type not in TYPES:
        raise UserError(f"type={gguf_type!r} is not supported; choose one of {', '.join(TYPES)}")
    extras.need("gguf", purpose="writing GGUF")
    path = Path(path)
    model = _plain(path, base) if _is_plain(path) else _adapted(*adapter_and_base(path, base))
    output = Path(output).resolve()
    _check_place(output, model, overwrite)
    plan = _plan_file(model, gguf_type)
    check_space(output, plan.nbytes)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with (
        disk_errors(output, only=DISK_IS_FULL),
        console.progress(plan.nbytes, "writing GGUF", "B", unit_scale=True, shown=progress) as bar,
        new_file(output) as partial,
    ):
        plan.write(partial, output.stem, bar)
        fsync(partial)
    if model.merger.adapter is not None:
        warn_of_magnitudes(model.merger.adapter.path, model.merger.odd)
    return {
        "output": str(output),
        "tensors": len(plan.tensors),
        "merged": plan.merged,
        "bytes_written": output.stat().st_size,
        "in_f16": [name for name, tensor in plan.tensors.items() if gguf_type == "q8_0" and tensor.kind == "F16"],
    }


def _is_plain(path: Path) -> bool:
    """Whether `path` is a model's folder, not an adapter's, a checkpoint or a run."""
    holds = holds_adapter(path) or holds_adapter(path / run_folder.ADAPTER) or is_trained_weights(path)
    return not holds and (path / "config.json").is_file() and any(path.glob("*.safetensors"))


@dataclass(frozen=True)
class _Model:
    """What is written: tensors and their source, a config.json that fits them, and where the tokenizer is.

    `told` names the configuration in messages; `inputs` are the folders that are read.
    """

    outputs: Sequence[Output]
    merger: Merger
    config: dict[str, Any]
    tokenizer: Path
    told: str
    inputs: dict[str, Path]


def _plain(folder: Path, base: str | None) -> _Model:
    if base is not None:
        raise UserError(f"--base {base}: {folder} is a whole model; leave it out")
    found = ModelFolder.open(folder)
    entries = sorted(found.tensors.entries.items(), key=lambda item: (item[1].path, item[1].offset))
    outputs = [Output(modern(name), torch.float32, found.tensors, entry) for name, entry in entries]
    merger = Merger(None, PLAIN, False, _REMEDY)
    return _Model(outputs, merger, found.config, found.path, str(found.path / "config.json"), {"model": found.path})


def _adapted(adapter_folder: Path, base_name: str) -> _Model:
    adapter = open_adapter(adapter_folder)
    storage = storage_in_training(adapter)
    base = open_base(adapter, base_name)
    warn_of_misfit(adapter, base.tensors)
    plan = plan_merge(adapter, base, "fp32")
    config = merged_config(base.config, adapter.model_config, dtype=None, untied=plan.untied)
    return _Model(
        plan.outputs,
        Merger(adapter.of_base(plan.adapted), storage, False, _REMEDY),
        config,
        own_tokenizer(adapter_folder) or base.path,
        str(base.path / "config.json"),
        {"base": base.path, "adapter": Path(adapter_folder)},
    )


def _check_place(output: Path, model: _Model, overwrite: bool) -> None:
    if output.is_dir():
        raise UserError(f"{output}: is a folder; give the name of a file, such as {output / 'model.gguf'}")
    if "adapter" in model.inputs:
        check_place(output, model.inputs["base"], model.inputs["adapter"], what="a GGUF file", marks=())
    else:
        check_output(output, model.inputs)
    if output.exists():
        if not overwrite:
            raise UserError(f"{output}: already exists; choose another name, or replace it with --overwrite")
        with output.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(f"{output}: already exists and is not a GGUF file; choose another name")


@dataclass(frozen=True)
class _FilePlan:
    """What the file holds: the model's fields, its vocabulary, and tensors by their names in GGUF, most of `gguf_type`,
    of which `merged` are adapted.
    """

    layout: Layout
    vocabulary: Vocabulary
    tensors: Mapping[str, _Streamed]
    gguf_type: str
    merged: int

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, file: Path, name: str, bar: Any) -> None:
        """Write the whole file; `bar` counts the bytes of tensors."""
        from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

        writer: Any = GGUFWriter(file, self.layout.architecture.name)
        try:
            writer.add_name(name)
            self.layout.write(writer)
            self.vocabulary.write(writer)
            kind = self.gguf_type.upper()
            writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
            writer.add_quantization_version(GGML_QUANT_VERSION)
            for own, tensor in self.tensors.items():
                writer.add_tensor(own, replace(tensor, bar=bar), raw_dtype=GGMLQuantizationType[tensor.kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _plan_file(model: _Model, gguf_type: str) -> _FilePlan:
    """Raises UserError for a model or tokenizer that llama.cpp would compute in another way."""
    layout = Layout(model.config, model.told)
    names = layout.names(each.name for each in model.outputs)
    rows = next(each.entry.shape[0] for each in model.outputs if names.get(each.name) == "token_embd.weight")
    vocabulary = vocabulary_of(load_tokenizer(model.tokenizer), rows, str(model.tokenizer))
    written = [(each, names[each.name]) for each in model.outputs if each.name in names]
    tensors = {name: _streamed(each, name, layout, merger=model.merger, gguf_type=gguf_type) for each, name in written}
    if (factors := layout.frequency_factors()) is not None:
        tensors["rope_freqs.weight"] = _Streamed("F32", tuple(factors.shape), lambda: iter([factors[:, None]]))
    return _FilePlan(layout, vocabulary, tensors, gguf_type, sum(each.module is not None for each, _ in written))


@dataclass(frozen=True)
class _Streamed:
    """A tensor of GGUF's type `kind` as `GGUFWriter` takes arrays, but made while it is written.

    `blocks` gives its rows, (rows, width), fp32 or in the dtype of `kind`.
    """

    kind: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]
    bar: Any = None
    dtype = np.dtype("V1")  # the writer goes by `kind`

    @property
    def nbytes(self) -> int:
        numel = math.prod(self.shape)
        return numel // _BLOCK * 34 if self.kind == "Q8_0" else numel * _DTYPES[self.kind].itemsize

    def tofile(self, stream: IO[bytes]) -> None:
        for block in self.blocks():
            data = _encoded(block, self.kind)
            data.tofile(stream)
            if self.bar is not None:
                self.bar.update(data.nbytes)


def _streamed(output: Output, name: str, layout: Layout, *, merger: Merger, gguf_type: str) -> _Streamed:
    shape = output.entry.shape
    kind = _kind(shape, gguf_type)
    cast = replace(output, dtype=_DTYPES.get(kind, torch.float32))
    width = shape[1] if len(shape) > 1 else 1

    def blocks() -> Iterator[Tensor]:
        return layout.turned(name, (block.view(-1, width) for block in merger.blocks(cast)))

    return _Streamed(kind, shape, blocks)


def _kind(shape: Sequence[int], gguf_type: str) -> str:
    """GGUF's type of a tensor: llama.cpp adds and multiplies vectors in fp32 alone."""
    if len(shape) < 2:
        return "F32"
    return "F16" if gguf_type == "q8_0" and shape[-1] % _BLOCK else gguf_type.upper()


def _encoded(block: Tensor, kind: str) -> np.ndarray[Any, Any]:
    if kind == "Q8_0":
        from gguf import GGMLQuantizationType, quants

        return quants.quantize(block.contiguous().numpy(), GGMLQuantizationType.Q8_0)
    block = block.to(_DTYPES[kind]).contiguous()
    return (block.view(torch.int16) if kind == "BF16" else block).numpy()
