"""A model's folder as it lies on disk: what is wrong with it, found before anything is built of it."""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_dist.config.names import is_local
from dora_dist.config.source import absence
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import read_json_object
from dora_dist.weights.safetensors_io import TensorEntry, TensorFolder

if TYPE_CHECKING:
    from dora_dist.config import RunConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Of weights, as the configuration and the command line call them."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What weights are computed with as they are."""
_NOT_QUANTISED = (*FLOATS, torch.int64, torch.bool)
"""These, and positions and masks that some folders hold."""
GENERATION_CONFIG = "generation_config.json"
_GENERATION_REMEDY = "correct it, or delete it: it only holds defaults for generation"
_OWN_MODELS = {"vl_bart": "dora_dist.models.vl_bart.modeling"}
"""model_type -> the module that makes transformers know it; of the models whose classes are this package's."""
_REMEDY = "take the config.json of the model's own repository"
_BLOCK = 128
_SIGNS = {
    "weight_scale_inv": "FP8 with a scale per block",
    "absmax": "bitsandbytes, 4 bit",
    "SCB": "bitsandbytes, 8 bit",
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors",
}
"""The end of a tensor's name -> what writes such tensors."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a config.json (`config`, plain JSON) and the headers of its weights (`tensors`)."""

    path: Path
    config: dict[str, Any]
    tensors: TensorFolder

    @classmethod
    def open(cls, path: Path | str, option: str = "") -> ModelFolder:
        """Read and check what can be known without building the model; `option` is what named the folder.

        Raises UserError that names the file: for a missing or broken one, for quantised weights, which would be
        taken for plain numbers, and for sizes in config.json that these weights cannot have.
        """
        path = Path(path)
        if not path.is_dir():
            wrong = not_a_folder(path, "give a Hugging Face model folder")
            raise UserError(f"{option} {path}: {wrong}".lstrip())
        config = read_config(path)
        tensors = _tensors(path)
        _refuse_settings(path, config, tensors)
        _refuse_quantised(tensors)
        _refuse_sizes(path, config, tensors)
        return cls(path, config, tensors)


def check_base(config: RunConfig) -> None:
    """Raise UserError for what is wrong with a run's base model, if that is a folder here (see `ModelFolder.open`)."""
    if is_local(config.model.path):
        ModelFolder.open(config.model.path)


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model's folder. Raises UserError for one that no model can have."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{file}: {absence(file)}; {_REMEDY}")
    config = read_json_object(file, _REMEDY)
    kind = config.get("model_type")
    if kind is None:
        raise UserError(f"{file}: no model_type in it, which says what model it is; {_REMEDY}")
    if not isinstance(kind, str):
        raise UserError(f"{file}: model_type = {kind!r}: must be text; {_REMEDY}")
    return config


def transformers_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of transformers that a folder's config.json describes. Raises UserError."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    file, raw = path / "config.json", read_config(path)
    kind = raw["model_type"]
    if kind in _OWN_MODELS:
        importlib.import_module(_OWN_MODELS[kind])
    own_code = "AutoConfig" in (raw.get("auto_map") or {})
    if kind not in CONFIG_MAPPING and own_code and not trust_remote_code:
        raise UserError(f"{file}: {own_code_needed(path)}")
    if kind not in CONFIG_MAPPING and not own_code:
        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING), 1)
        hint = f'did you mean "{near[0]}"?' if near else "is it newer than this version?"
        raise UserError(f'{file}: transformers {transformers.__version__} knows no model_type "{kind}"; {hint}')
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # each family checks its fields in its own way
        raise UserError(f"{file}: {reason(error)}; {_REMEDY}") from error


def generation_config(path: Path) -> Any:
    """The generation_config.json of a folder, which has one. Raises UserError."""
    from transformers import GenerationConfig

    file = path / GENERATION_CONFIG
    read_json_object(file, _GENERATION_REMEDY)
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:  # its checks raise what they like
        raise UserError(f"{file}: {reason(error)}; {_GENERATION_REMEDY}") from error


def own_code_needed(path: Path | str) -> str:
    """What to do about a model or tokenizer with code of its own, which runs on request only."""
    return (
        f"it needs its own code (auto_map), which is not run unasked: read the *.py files in {path}, then set "
        "model.trust_remote_code to true for training; consolidate and evaluate never run a model's own code"
    )


def reason(error: BaseException) -> str:
    """What an exception of a library says, on one line; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError | ArithmeticError) or not text else text


def not_a_folder(path: Path, remedy: str) -> str:
    """What is wrong with a path that should be a folder, and what to do: for a file what it asks for, else `remedy`."""
    if path.suffix == ".gguf":
        return f"convert it with `dora-dist import-gguf {shlex.quote(str(path))} --output FOLDER` and give that folder"
    if path.is_file():
        return f'is a file; give the folder that it is in, "{path.parent}"'
    return f"{absence(path, 'folder')}; {remedy}"


def _tensors(path: Path) -> TensorFolder:
    """The headers of a folder's weights; what is there instead where there are none."""
    for file in sorted(path.glob("*.safetensors*")):
        if file.is_symlink() and not file.exists():
            raise UserError(f"{file}: {absence(file)}; copy what it points to as well (`cp -L`)")
    if not any(path.glob("*.safetensors")) and (packed := sorted(path.glob("*.gguf"))):
        raise UserError(f"{path}: no .safetensors file in it; {not_a_folder(packed[0], '')}")
    tensors = TensorFolder.open(path)
    if not tensors.entries:
        raise UserError(f"{path}: its weight files hold no tensor; download or copy them again")
    return tensors


# --- quantised weights ------------------------------------------------------------------------------------------------


def _quantisation(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Where config.json says that weights are quantised, and what it says."""
    for key in ("quantization_config", "compression_config"):
        for section in ("", "text_config"):
            place = (config.get(section) or {}) if section else config
            if isinstance(place, dict) and place.get(key) is not None:
                return (f"{section}.{key}" if section else key), place[key]
    return None


def _refuse_settings(path: Path, config: Mapping[str, Any], tensors: TensorFolder) -> None:
    """Raise UserError for a folder whose config.json speaks of quantisation."""
    settings = _quantisation(config)
    if settings is None:
        return
    key, values = settings
    method = str(values.get("quant_method", "unknown")) if isinstance(values, dict) else str(values)
    label = f'{path / "config.json"}: {key} has quant_method "{method}"'
    found = next((entry for entry in tensors.entries.values() if entry.dtype not in _NOT_QUANTISED), None)
    if found is None:
        name = key.rpartition(".")[2]
        raise UserError(f"{label}, though no tensor of it is quantised; if that is meant, delete {name} from the file")
    raise UserError(f"{label} ({found.name!r} is {_dtype(found)}); {_unquantised(tensors)}")


def _refuse_quantised(tensors: TensorFolder) -> None:
    for found in _quantised(tensors):
        ends = [name for name in tensors.entries if name.rpartition(".")[2] in _SIGNS]
        method = next((_SIGNS[name.rpartition(".")[2]] for name in ends), "by what method is not known")
        beside = f" with {ends[0].rpartition('.')[2]!r}" if ends else ""
        raise UserError(
            f"{found.path}: tensor {found.name!r} is quantised: {_dtype(found)}{beside} ({method}); "
            f"{_unquantised(tensors)}"
        )


def _quantised(tensors: TensorFolder) -> Iterator[TensorEntry]:
    """Tensors that hold weights in another way than as numbers to compute with."""
    for entry in tensors.entries.values():
        ending = entry.name.rpartition(".")[2]
        holds_weights = ending in ("weight", "qweight", "weight_packed") or entry.dtype.is_floating_point
        if entry.dtype not in FLOATS and holds_weights:
            yield entry


def _unquantised(tensors: TensorFolder) -> str:
    """How to get weights to compute with: the model's own, or, of FP8 blocks, transformers' arithmetic.

    That takes the size of a block from the number of scales, which is right where blocks are whole.
    """
    scaled = [name.removesuffix("_scale_inv") for name in tensors.entries if name.endswith(".weight_scale_inv")]
    shapes = [tensors.entries[name].shape for name in scaled if name in tensors.entries]
    instead = "adapters are trained and merged on bf16, fp16 or fp32 weights: give the model before quantisation"
    if not shapes or any(side % _BLOCK for shape in shapes for side in shape):
        return instead
    source = os.path.normpath(tensors.path)
    program = (
        f"import transformers as t; a, b = {source!r}, {source + '-bf16'!r}; "
        "t.AutoModelForCausalLM.from_pretrained(a, dtype='bfloat16', "
        "quantization_config=t.FineGrainedFP8Config(dequantize=True)).save_pretrained(b, save_original_format=False); "
        "t.AutoTokenizer.from_pretrained(a).save_pretrained(b)"
    )
    return f"{instead}, or the folder that this writes:\n    python -c {shlex.quote(program)}"


def _dtype(entry: TensorEntry) -> str:
    return str(entry.dtype).removeprefix("torch.")


# --- sizes ------------------------------------------------------------------------------------------------------------

_WIDTHS = ("hidden_size", "intermediate_size", "vocab_size")


def _refuse_sizes(path: Path, config: Mapping[str, Any], tensors: TensorFolder) -> None:
    """Raise UserError for sizes that these tensors cannot have: a model of such sizes is not even built."""
    section = config.get("text_config")
    sizes = section if isinstance(section, dict) else config
    most = sum(entry.numel for entry in tensors.entries.values())
    for name in ("num_hidden_layers", "num_attention_heads", *_WIDTHS):
        value = sizes.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue  # transformers says what it expects
        label = f"{path / 'config.json'}: {name} = {value}"
        if value < 1:
            raise UserError(f"{label}: must be 1 or more; {_REMEDY}")
        if name == "num_hidden_layers" and value > len(tensors.entries):
            raise UserError(f"{label}: the files hold {len(tensors.entries)} tensors in all; {_REMEDY}")
        if name in _WIDTHS and value > most:
            raise UserError(f"{label}: the files hold {most:,} numbers in all; {_REMEDY}")
    heads, groups = sizes.get("num_attention_heads"), sizes.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
        raise UserError(
            f"{path / 'config.json'}: num_key_value_heads = {groups}: must divide num_attention_heads = {heads}; "
            f"{_REMEDY}"
        )
