"""A GGUF file as an ordinary Hugging Face folder: converted once, then every tool can read it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_dist.models.folder import DTYPES
from dora_dist.runtime import extras
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import check_output, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def import_gguf(file: Path, output: Path, *, dtype: str = "bf16", overwrite: bool = False) -> None:
    """Convert `file` into the folder `output`: weights dequantised to `dtype` ("bf16", "fp16" or "fp32") as
    safetensors, config, generation config, tokenizer and chat template.

    Raises UserError when `file` is not a readable GGUF file or of an architecture that transformers cannot read,
    the package `gguf` is missing, `dtype` is unknown, or `output` exists and `overwrite` is False.
    """
    file = Path(file)
    _check_file(file)
    check_output(Path(output), {"GGUF file": file})
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    extras.need("gguf", purpose=f"{file}: reading GGUF")
    with new_folder(output, overwrite) as folder:
        model, tokenizer = _load(file, DTYPES[dtype])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file}: {'is a folder; give a .gguf file in it' if file.is_dir() else 'no such file'}")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{file}: not a GGUF file (it does not start with 'GGUF'); download it again")


def _load(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The dequantised model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": dtype, "output_loading_info": True}
    # Left to itself, a machine with the right kernels would keep the packed blocks as weights.
    options["quantization_config"] = GgufConfig(dequantize=True)
    advice = "use a complete file of a LLaMA model"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, **options)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:  # the parsers raise any
        raise UserError(f"{file}: cannot be converted: {error}; {advice}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{file}: holds no weights for {missing[0]!r}; {advice}")
    return model, tokenizer
