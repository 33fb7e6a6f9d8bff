"""PEFT adapter folders, in and out: adapter_config.json + adapter_model.safetensors.

PEFT keeps lora_A as (r, in), lora_B as (out, r) and the whole magnitude m (not an offset), and merges as
W = (m / n)[:, None]·(W0 + s·B·A) with n the row norms of the bracket: the same function as here, save that it
divides by n even where n is 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dora_dist.adapters.peft_config import (
    CONFIG_NAME,
    NO_TARGETS,
    REMEDY,
    pattern_value,
    read_json_object,
    read_peft_config,
    targets,
)
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.adapters.storage import PLAIN
from dora_dist.runtime.console import warn
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import new_folder
from dora_dist.weights.safetensors_io import TensorFolder, TensorWriter

MODEL_CONFIG_NAME = "model_config.json"
"""Fields of a model's config.json that its base's has not (its head's labels); PEFT does not look at it."""
WEIGHTS_STEM = "adapter_model"
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
# PEFT lists these for its task types whatever the model's head is called.
_HEADS_PEFT_ADDS = {"classifier", "score", "qa_outputs"}
_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BASE_DIGEST, _BASE_STORAGE = "dora_dist.base", "dora_dist.storage"
"""Where a file of ours says, in its metadata, of which base it is (`weights/digest.py`), and how that was held; others
do not look at it."""


@dataclass
class PeftAdapter:
    """An adapter in memory; `layers` maps module names of the base model to their parameters.

    `lora_alpha` and `r` are the defaults that single layers may depart from. `modules_to_save` are modules trained
    in full, `trained` their parameters by name, fp32, and `model_config` what the model's configuration needs for
    them. `base_digest` is the `sampled_digest` of the base, "" where it is not known, `base_storage` the storage
    that held it in training, and `source` the folder that it was read from.
    """

    base_model: str
    lora_alpha: float
    r: int
    dropout: float
    use_dora: bool
    layers: dict[str, AdapterLayer]
    task_type: str | None = "CAUSAL_LM"
    revision: str | None = None
    modules_to_save: list[str] = field(default_factory=list)
    trained: dict[str, Tensor] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)
    base_digest: str = ""
    base_storage: str = PLAIN.name
    source: PeftFolder | None = None


@dataclass
class PeftFolder:
    """A PEFT folder that was checked but not read: `layer` reads one module, so memory stays small."""

    path: Path
    config: dict[str, Any]
    tensors: TensorFolder
    modules: dict[str, dict[str, str]] = field(default_factory=dict)  # module -> part -> name in the file
    trained: dict[str, str] = field(default_factory=dict)  # parameter of a module to save -> name in the file
    model_config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> PeftFolder:
        """Check config and headers. UserError names the file and the field or tensor that does not fit."""
        path = Path(path)
        config = read_peft_config(path / CONFIG_NAME)
        if not any(path.glob(f"{WEIGHTS_STEM}.safetensors*")):
            hint = "save the adapter as safetensors; pickled .bin adapters are never loaded"
            raise UserError(f"{path}: no {WEIGHTS_STEM}.safetensors; {hint}")
        folder = cls(path, config, TensorFolder.open(path, stem=WEIGHTS_STEM))
        if (path / MODEL_CONFIG_NAME).is_file():
            folder.model_config = read_json_object(path / MODEL_CONFIG_NAME, REMEDY)
        targeted = targets(config)
        for name, entry in folder.tensors.entries.items():
            if entry.dtype not in _NUMBERS:
                kind = str(entry.dtype).removeprefix("torch.")
                raise UserError(f"{entry.path}: tensor {name!r} is {kind}, not floating point; save the adapter again")
            if saved := _saved_name(name, config.get("modules_to_save") or []):
                folder.trained[saved] = name
                continue
            module, part = _split_name(folder.path, name)
            if not targeted(module):
                raise UserError(
                    f"{path / CONFIG_NAME}: target_modules={config['target_modules']!r} leave out {module!r}, which "
                    f"{entry.path.name} has values for (PEFT would ignore them); correct target_modules"
                )
            folder.modules.setdefault(module, {})[part] = name
        if not folder.modules and not folder.trained:
            raise UserError(f"{path}: the adapter has no tensors; save it again")
        endings = set(config.get("modules_to_save") or ()) - _HEADS_PEFT_ADDS
        if absent := sorted(e for e in endings if not any(_saved_module(name, [e]) for name in folder.trained)):
            raise UserError(f"{path}: modules_to_save={absent} have no tensors in the adapter; save it again")
        for module in folder.modules:
            folder._check(module)
        return folder

    def _check(self, module: str) -> None:
        parts = self.modules[module]
        needed = {"lora_A", "lora_B"} | ({"magnitude"} if self.config.get("use_dora") else set())
        if set(parts) != needed:
            present, use_dora = ", ".join(sorted(parts)), bool(self.config.get("use_dora"))
            raise UserError(
                f"{self.path}: module {module!r} has {present}, but with use_dora={use_dora} "
                f"{', '.join(sorted(needed))} are needed; save the adapter again"
            )
        shapes = {part: self.tensors.entries[name].shape for part, name in parts.items()}
        r = pattern_value(self.config, "rank_pattern", "r", module)
        fits = len(shapes["lora_A"]) == len(shapes["lora_B"]) == 2
        fits = fits and shapes["lora_A"][0] == shapes["lora_B"][1] == r
        fits = fits and shapes.get("magnitude", shapes["lora_B"][:1]) == shapes["lora_B"][:1]
        if not fits:
            found = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
            expected = f"with r={r} they must be lora_A (r, in), lora_B (out, r), magnitude (out,)"
            raise UserError(f"{self.path}: module {module!r} has {found}; {expected}")

    def lacking(self, modules: Iterable[str]) -> list[str]:
        """Those of the base's linear `modules` that are like adapted ones in other layers, and targets as they are, but
        have no tensors here: a folder that is not whole.
        """
        if self.config.get("layers_to_transform") is not None:
            return []
        targeted, kinds = targets(self.config), {_kind(module) for module in self.modules}
        return [m for m in modules if m not in self.modules and _kind(m) in kinds and targeted(m)]

    def base_digest(self) -> str:
        """The digest of the base that it was trained on; "" where the folder does not say."""
        return self._metadata(_BASE_DIGEST, "")

    def base_storage(self) -> str:
        """The name of the storage that held the base in training: the adapter fits the weights as that has them."""
        return self._metadata(_BASE_STORAGE, PLAIN.name)

    def _metadata(self, key: str, absent: str) -> str:
        file = self.path / f"{WEIGHTS_STEM}.safetensors"
        if not file.is_file():
            return absent
        with safe_open(file, "pt") as opened:
            return str((opened.metadata() or {}).get(key, absent))

    def modules_to_save(self) -> list[str]:
        """The modules whose parameters are in `trained`, by their whole names."""
        listed = self.config.get("modules_to_save") or []
        return list(dict.fromkeys(module for name in self.trained if (module := _saved_module(name, listed))))

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of the weight that `module` must have in the base."""
        parts, entries = self.modules[module], self.tensors.entries
        return entries[parts["lora_B"]].shape[0], entries[parts["lora_A"]].shape[1]

    def layer(self, module: str) -> AdapterLayer:
        """Read one module's parameters. Raises UserError, naming the tensor, where they are not finite."""
        parts = {part: self.read(name) for part, name in self.modules[module].items()}
        lora_A, lora_B, magnitude = parts["lora_A"], parts["lora_B"], parts.get("magnitude")
        r = lora_A.shape[0]
        alpha = pattern_value(self.config, "alpha_pattern", "lora_alpha", module)
        scaling = alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)
        return AdapterLayer.of_stored(lora_A, lora_B, magnitude, scaling)

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the file, fp32. Raises UserError, naming it, where it is not finite."""
        values = self.tensors.read(name, dtype=torch.float32)
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise UserError(
                f"{self.tensors.entries[name].path}: tensor {name!r} holds {bad:,} numbers that are NaN, infinite or "
                "too large for fp32: training diverged before it was saved; use an earlier checkpoint"
            )
        return values


def warn_of_magnitudes(path: Path, odd: Mapping[str, int]) -> None:
    """One warning over `odd_magnitudes` of an adapter's layers, by module."""
    if total := sum(odd.values()):
        first = next(module for module, count in odd.items() if count)
        warn(
            f"{path}: {total:,} magnitudes are 0 or below (first in {first!r}); such a row of a weight is silenced or "
            "turned around, which training seldom does: make sure that the adapter is whole"
        )


def warn_of_lacking(path: Path, lacking: Sequence[str]) -> None:
    """One warning over modules that `PeftFolder.lacking` found."""
    if lacking:
        more = f" and {len(lacking) - 1:,} others" if len(lacking) > 1 else ""
        warn(
            f"{path} has no tensors for {lacking[0]!r}{more}, which its target_modules name: what they adapt stays as "
            "in the base; make sure that the folder is whole"
        )


def read_peft_folder(path: Path) -> PeftAdapter:
    """Read a PEFT LoRA or DoRA folder, with its rank_pattern, alpha_pattern and use_rslora.

    Raises UserError, naming file and field, for anything that the adapters here cannot express.
    """
    folder = PeftFolder.open(path)
    config = folder.config
    layers = {module: folder.layer(module) for module in folder.modules}
    warn_of_magnitudes(folder.path, {module: layer.odd_magnitudes() for module, layer in layers.items()})
    return PeftAdapter(
        base_model=config.get("base_model_name_or_path") or "",
        lora_alpha=config["lora_alpha"],
        r=config["r"],
        dropout=config.get("lora_dropout") or 0.0,
        use_dora=bool(config.get("use_dora")),
        layers=layers,
        task_type=config.get("task_type"),
        revision=config.get("revision"),
        modules_to_save=folder.modules_to_save(),
        trained={name: folder.read(stored) for name, stored in folder.trained.items()},
        model_config=folder.model_config,
        base_digest=folder.base_digest(),
        base_storage=folder.base_storage(),
        source=folder,
    )


def write_peft_folder(
    path: Path, adapter: PeftAdapter, dtype: torch.dtype = torch.float32, overwrite: bool = False
) -> None:
    """Write `adapter` so that peft.PeftModel.from_pretrained computes the same function.

    `dtype` is that of lora_A and lora_B; magnitudes stay fp32, as rounding them would move every weight. A
    magnitude-only module becomes a rank-one LoRA whose B is zero, since PEFT has no such module. All layers
    must have a magnitude when `use_dora`, none otherwise (ValueError). UserError when `path` exists, unless
    `overwrite`.
    """
    tensors: dict[str, Tensor] = {}
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for module, layer in adapter.layers.items():
        if (layer.magnitude is not None) != adapter.use_dora:
            raise ValueError(f"{module}: use_dora={adapter.use_dora} holds for all layers of a PEFT adapter")
        lora_A, lora_B = (factor.to(dtype) for factor in layer.stored_factors(module))
        r, alpha = lora_A.shape[0], layer.scaling * lora_A.shape[0]
        if r != adapter.r:
            rank_pattern[f"^{module}"] = r  # anchored: PEFT would also match it as another name's ending
        if not math.isclose(alpha, adapter.lora_alpha, rel_tol=1e-9) and layer.lora_A is not None:
            alpha_pattern[f"^{module}"] = _whole(alpha)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = lora_A
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = lora_B
        if layer.magnitude is not None:
            tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = layer.magnitude.float()
    tensors |= {f"{_PREFIX}{name}": values.float() for name, values in adapter.trained.items()}
    config = {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model or None,
        "revision": adapter.revision,
        "r": adapter.r,
        "lora_alpha": _whole(adapter.lora_alpha),
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.use_dora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(adapter.layers) or NO_TARGETS,
        "modules_to_save": adapter.modules_to_save or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    metadata = {"format": "pt", **({_BASE_DIGEST: adapter.base_digest} if adapter.base_digest else {})}
    if adapter.base_storage != PLAIN.name:
        metadata[_BASE_STORAGE] = adapter.base_storage
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with new_folder(path, overwrite) as folder:
        with TensorWriter(folder / f"{WEIGHTS_STEM}.safetensors", layout, metadata) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if adapter.model_config:
            text = json.dumps(adapter.model_config, indent=2) + "\n"
            (folder / MODEL_CONFIG_NAME).write_text(text, encoding="utf-8")


def _saved_name(name: str, modules_to_save: list[str]) -> str | None:
    """ "base_model.model.<parameter>" -> <parameter>, if it is of a module that the configuration says was saved."""
    parameter = name.removeprefix(_PREFIX)
    return parameter if parameter != name and _saved_module(parameter, modules_to_save) else None


def _saved_module(parameter: str, modules_to_save: list[str]) -> str | None:
    """The outermost module of a parameter that is to be saved: PEFT saves every one whose name ENDS in one listed."""
    parts = parameter.split(".")
    outwards = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((module for module in outwards if module.endswith(tuple(modules_to_save))), None)


def _split_name(path: Path, name: str) -> tuple[str, str]:
    """ "base_model.model.<module>.lora_A.weight" -> (<module>, "lora_A")."""
    for ending, part in _PARTS.items():
        if name.startswith(_PREFIX) and name.endswith(f".{ending}"):
            return name[len(_PREFIX) : -len(ending) - 1], part
    known = "only LoRA and DoRA of linear layers can be read (lora_A, lora_B, lora_magnitude_vector)"
    raise UserError(f"{path}: tensor {name!r} is not supported; {known}")


def _kind(module: str) -> str:
    """A module's name without its layer's number."""
    return re.sub(r"\d+", "#", module)


def _whole(number: float) -> float:
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number
