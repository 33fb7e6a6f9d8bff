"""A PEFT adapter folder, checked but not yet read: what its configuration and its tensors' names and shapes say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from torch import Tensor

from dora_dist.adapters.adapter_folder import MODEL_CONFIG_NAME
from dora_dist.adapters.peft_config import (
    CONFIG_NAME,
    REMEDY,
    pattern_value,
    read_peft_config,
    targets,
)
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.adapters.storage import PLAIN
from dora_dist.runtime.console import warn
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import read_json_object
from dora_dist.weights.safetensors_io import TensorFolder

WEIGHTS_STEM = "adapter_model"
PREFIX = "base_model.model."
"""How PEFT begins the name of every tensor."""
BASE_DIGEST, BASE_STORAGE, BASE_PACKED = "dora_dist.base", "dora_dist.storage", "dora_dist.packed"
"""Where a file of ours says, in its metadata, of which base it is (`weights/digest.py`), and how that was held; others
do not look at it."""
PARAMETERS = "dora_dist.parameters"
"""Where such a file lists, in JSON, which of its tensors are single parameters of the base; PEFT reads these, too."""
BASE_LAYER = "base_layer"
"""What PEFT calls the layer in an adapted one."""
# What PEFT calls the two copies of a module to save inside its wrapper; a folder has the module under its own name.
_WRAPPED = (".original_module.", ".modules_to_save.")
# PEFT lists these for its task types whatever the model's head is called.
_HEADS_PEFT_ADDS = {"classifier", "score", "qa_outputs"}
_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class PeftFolder:
    """A PEFT folder of LoRA or DoRA that was checked but not read: `layer` reads one module, so memory stays small."""

    parts: ClassVar[dict[str, str]] = {
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
    }
    """How the names of a module's tensors end in the file, and what they are here."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Names in the file of tensors that are of no single module."""

    path: Path
    config: dict[str, Any]
    tensors: TensorFolder
    modules: dict[str, dict[str, str]] = field(default_factory=dict)  # module -> part -> name in the file
    trained: dict[str, str] = field(default_factory=dict)  # parameter of a module to save -> name in the file
    model_config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Check config and headers. UserError names the file and the field or tensor that does not fit."""
        path = Path(path)
        config = read_peft_config(path / CONFIG_NAME)
        if not any(path.glob(f"{WEIGHTS_STEM}.safetensors*")):
            hint = "save the adapter as safetensors; pickled .bin adapters are never loaded"
            raise UserError(f"{path}: no {WEIGHTS_STEM}.safetensors; {hint}")
        folder = cls(path, config, TensorFolder.open(path, stem=WEIGHTS_STEM))
        if (path / MODEL_CONFIG_NAME).is_file():
            folder.model_config = read_json_object(path / MODEL_CONFIG_NAME, REMEDY)
        targeted, listed = targets(config), folder._listed_parameters()
        for name, entry in folder.tensors.entries.items():
            if entry.dtype not in _NUMBERS:
                kind = str(entry.dtype).removeprefix("torch.")
                raise UserError(f"{entry.path}: tensor {name!r} is {kind}, not floating point; save the adapter again")
            if name in cls.shared or folder._is_repeated(name):
                continue
            if saved := _saved_name(name, config.get("modules_to_save") or []):
                folder.trained[saved] = name
                continue
            if name in listed or _is_bias(name, config.get("bias")):
                folder.trained[name.removeprefix(PREFIX).replace(f".{BASE_LAYER}.", ".")] = name
                continue
            module, part = folder._split_name(name)
            if not targeted(module):
                raise UserError(
                    f"{path / CONFIG_NAME}: target_modules={config['target_modules']!r} leave out {module!r}, which "
                    f"{entry.path.name} has values for (PEFT would ignore them); correct target_modules"
                )
            folder.modules.setdefault(module, {})[part] = name
        if not folder.modules and not folder.trained:
            raise UserError(f"{path}: the adapter has no tensors; save it again")
        endings = set(config.get("modules_to_save") or ()) - _HEADS_PEFT_ADDS
        if absent := sorted(e for e in endings if not any(saved_module(name, [e]) for name in folder.trained)):
            raise UserError(f"{path}: modules_to_save={absent} have no tensors in the adapter; save it again")
        for module in folder.modules:
            folder._check(module)
        return folder

    def _is_repeated(self, name: str) -> bool:
        """Whether it is one of the biases of modules to save that PEFT, with bias="all", writes two more times.

        Raises UserError for anything else from inside PEFT's wrapper of such a module.
        """
        wrapped = next((part for part in _WRAPPED if part in name), None)
        if wrapped is None:
            return False
        own = name.replace(wrapped, ".")
        if self.config.get("bias") == "all" and name.endswith(".bias") and own in self.tensors.entries:
            return True
        raise UserError(
            f"{self.tensors.entries[name].path}: tensor {name!r} is from inside PEFT's wrapper of a trained module, "
            "which PEFT itself saves under the module's own name; save the adapter again with PEFT's save_pretrained"
        )

    def _split_name(self, name: str) -> tuple[str, str]:
        """ "base_model.model.<module>.lora_A.weight" -> (<module>, "lora_A")."""
        for ending, part in self.parts.items():
            if name.startswith(PREFIX) and name.endswith(f".{ending}"):
                return name[len(PREFIX) : -len(ending) - 1], part
        known = f"only adapters of linear layers can be read ({', '.join(dict.fromkeys(self.parts.values()))})"
        raise UserError(f"{self.path}: tensor {name!r} is not supported; {known}")

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
        """Those of the base's linear `modules` that are like adapted ones in other layers, and targets as they are, and
        whose tensors are missing here: the folder is not whole.
        """
        if self.config.get("layers_to_transform") is not None:
            return []
        targeted, kinds = targets(self.config), {_kind(module) for module in self.modules}
        return [m for m in modules if m not in self.modules and _kind(m) in kinds and targeted(m)]

    @property
    def base_model(self) -> str:
        return self.config.get("base_model_name_or_path") or ""

    @property
    def revision(self) -> str | None:
        return self.config.get("revision")

    @property
    def task_type(self) -> str | None:
        return self.config.get("task_type")

    def base_digest(self) -> str:
        """The digest of the base that it was trained on; "" where the folder does not say."""
        return self._metadata(BASE_DIGEST, "")

    def base_storage(self) -> str:
        """The label of the storage that held the base in training: the adapter fits the weights as that has them."""
        return self._metadata(BASE_STORAGE, PLAIN.name)

    def base_packed(self) -> list[str] | None:
        """The modules whose weight that storage held, adapted or not; None where the folder does not say."""
        return self._listed(BASE_PACKED, "null")

    def _listed_parameters(self) -> set[str]:
        return {name for name in self._listed(PARAMETERS, "[]") or [] if name.startswith(PREFIX)}

    def _listed(self, key: str, absent: str) -> list[str] | None:
        """Names that the metadata has; None for null."""
        try:
            listed = json.loads(self._metadata(key, absent))
        except (ValueError, RecursionError):
            listed = 0
        if listed is None or (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
            return listed
        raise UserError(f"{self.path}: the metadata's {key} is not a list of names; {REMEDY}")

    def _metadata(self, key: str, absent: str) -> str:
        file = self.path / f"{WEIGHTS_STEM}.safetensors"
        if not file.is_file():
            return absent
        with safe_open(file, "pt") as opened:
            return str((opened.metadata() or {}).get(key, absent))

    def modules_to_save(self) -> list[str]:
        """The modules whose parameters are in `trained`, by their whole names."""
        listed = self.config.get("modules_to_save") or []
        return list(dict.fromkeys(module for name in self.trained if (module := saved_module(name, listed))))

    @property
    def lora_alpha(self) -> float:
        """PEFT's alpha of layers that have none of their own."""
        return float(self.config["lora_alpha"])

    @property
    def dropout(self) -> float:
        return float(self.config.get("lora_dropout") or 0.0)

    def checked(self) -> Self:
        """With what can be checked of the tensors' values before a base is known. Raises UserError."""
        return self

    def of_base(self, shapes: Mapping[str, tuple[int, int]]) -> Self:
        return self

    def shape(self, module: str) -> tuple[int, int | None]:
        """(out, in) of the weight that `module` must have in the base; None for what the folder does not say."""
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
        return self.tensors.read_finite(name)


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


def _saved_name(name: str, modules_to_save: list[str]) -> str | None:
    """ "base_model.model.<parameter>" -> <parameter>, if it is of a module that the configuration says was saved."""
    parameter = name.removeprefix(PREFIX)
    return parameter if parameter != name and saved_module(parameter, modules_to_save) else None


def saved_module(parameter: str, modules_to_save: Sequence[str]) -> str | None:
    """The outermost module of a parameter that is to be saved: PEFT saves every one whose name ENDS in one listed."""
    parts = parameter.split(".")
    outwards = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((module for module in outwards if module.endswith(tuple(modules_to_save))), None)


def _is_bias(name: str, kind: str | None) -> bool:
    """Whether a tensor is a bias of the base that was trained, as PEFT's `bias` says."""
    return kind not in (None, "none") and name.startswith(PREFIX) and name.endswith(".bias")


def _kind(module: str) -> str:
    """A module's name without its layer's number."""
    return re.sub(r"\d+", "#", module)
