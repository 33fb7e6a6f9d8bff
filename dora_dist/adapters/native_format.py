"""Our own adapter folder, for what PEFT has no format for: dora_dist_adapter.json + adapter.safetensors.

Without an adapter_config.json other tools refuse the folder, where they would have to guess. It holds a method's own
parameters, fp32, under their names in the model (`LAYER.magnitude_offset`), and each layer's shape and method, which
together say what function they stand for. Parameters trained in full are under their names, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dora_dist.adapters.adapter_folder import MODEL_CONFIG_NAME, AdapterFields, AdapterFolder, described, trained_of
from dora_dist.adapters.method import AdapterMethod, MergeRows, Shape
from dora_dist.adapters.methods import for_one_model, of_settings
from dora_dist.config.adapter import AdapterConfig
from dora_dist.config.names import OWN_ADAPTER
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import new_folder, read_json_object, write_json
from dora_dist.weights.safetensors_io import TensorFolder, TensorWriter

CONFIG_NAME = OWN_ADAPTER
WEIGHTS_STEM = "adapter"
FORMAT = 1
_REMEDY = "copy the adapter folder again, or save it again"
_TEXTS = ("base_model", "base_digest", "base_storage")


@dataclass(frozen=True)
class NativeLayer:
    """One adapted module: its method, the base weight's (out, in), and the method's parameters, fp32 on the CPU."""

    method: AdapterMethod
    shape: Shape
    values: Mapping[str, Tensor]

    def merge_rows(self, weight: Tensor, start: int) -> None:
        self._merge(weight, start)

    @cached_property
    def _merge(self) -> MergeRows:
        return self.method.merger(self.shape, self.values)

    def described(self) -> dict[str, Any]:
        """What the configuration says of it: `shared` is a digest of what the method's layers share, if anything."""
        shared = self.method.shared_digest()
        described = {"shape": list(self.shape), "method": self.method.settings()}
        return described | ({"shared": shared} if shared else {})

    def odd_magnitudes(self) -> int:
        return 0  # magnitudes are offsets here, which say nothing without the base's norms


@dataclass(kw_only=True)
class NativeAdapter(AdapterFields):
    """An adapter in memory, as `adapter_folder.SavedAdapter` has it; `layers` by module name of the base model."""

    base_model: str
    layers: dict[str, NativeLayer]
    source: AdapterFolder | None = None

    def methods(self) -> dict[str, AdapterMethod]:
        return {name: layer.method for name, layer in self.layers.items()}

    def differences(self, module: str, method: AdapterMethod) -> Iterator[str]:
        there = self.layers[module].method
        if (there.r == 0) != (method.r == 0):
            alone, remedy = ("a magnitude alone", "name it in") if there.r == 0 else ("an update", "take it out of")
            yield f"it trains {alone} there ({remedy} adapter.magnitude_only_modules)"
            return
        theirs, ours = there.function_settings(), method.function_settings()
        if theirs["method"] != ours["method"]:
            yield f"its method is {theirs['method']!r}, this run's {ours['method']!r} (adapter.method, null for lora)"
            return
        for name in sorted(theirs):
            if theirs[name] != ours[name]:
                field = f"adapter.{name}" if name in AdapterConfig.model_fields else f"adapter.settings: {name}"
                says = json.dumps(theirs[name])
                yield f"its {name} is {says}, {field} = {json.dumps(ours[name])} (set it to {says})"

    def values(self, module: str, method: AdapterMethod, base_norm: Tensor | None) -> Mapping[str, Tensor]:
        return self.layers[module].values

    def write(self, path: Path, overwrite: bool = False) -> None:
        """Write the folder `path`, all tensors in fp32. Raises UserError when it exists, unless `overwrite`."""
        config = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in (*_TEXTS, "revision", "task_type", "modules_to_save")},
            **({} if self.base_packed is None else {"base_packed": self.base_packed}),
            "trained": [*self.trained, *self.stored],
            "layers": {name: layer.described() for name, layer in self.layers.items()},
        }
        tensors = {f"{n}.{kind}": values for n, layer in self.layers.items() for kind, values in layer.values.items()}
        tensors |= self.trained
        layout = [(name, torch.float32, tuple(values.shape)) for name, values in tensors.items()]
        layout += [(n, torch.float32, source.entry(theirs).shape) for n, (source, theirs) in self.stored.items()]
        with new_folder(path, overwrite) as folder:
            with TensorWriter(folder / f"{WEIGHTS_STEM}.safetensors", layout, {"format": "pt"}) as writer:
                for name, values in tensors.items():
                    writer.write(name, values.float())
                for name, (source, theirs) in self.stored.items():
                    for piece in source.in_pieces(theirs, dtype=torch.float32):
                        writer.write(name, piece)
            write_json(folder / CONFIG_NAME, config)
            if self.model_config:
                write_json(folder / MODEL_CONFIG_NAME, self.model_config)


@dataclass
class NativeFolder:
    """A folder that was checked but not read; as `adapter_folder.AdapterFolder` has it."""

    path: Path
    config: dict[str, Any]
    tensors: TensorFolder
    modules: dict[str, tuple[AdapterMethod, Shape]] = field(default_factory=dict)
    trained: dict[str, str] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> NativeFolder:
        """Check configuration and headers. UserError names the file and the field or tensor that does not fit."""
        path = Path(path)
        config = _read_config(path / CONFIG_NAME)
        folder = cls(path, config, TensorFolder.open(path, stem=WEIGHTS_STEM))
        said = {name: _layer(path / CONFIG_NAME, name, layer) for name, layer in config["layers"].items()}
        shapes = {name: shape for name, (_, shape) in said.items()}
        methods = for_one_model({name: method for name, (method, _) in said.items()}, shapes)
        folder.modules = {name: (method, shapes[name]) for name, method in methods.items()}
        folder.trained = {name: name for name in config["trained"]}
        if (path / MODEL_CONFIG_NAME).is_file():
            folder.model_config = read_json_object(path / MODEL_CONFIG_NAME, _REMEDY)
        folder._check()
        return folder

    def _check(self) -> None:
        """Exactly the tensors that layers and trained parameters have, with the shapes that the methods say."""
        needed: dict[str, tuple[int, ...] | None] = dict.fromkeys(self.trained)
        for module, (method, shape) in self.modules.items():
            needed |= {f"{module}.{kind}": initial.shape for kind, initial in method.parameters(shape).items()}
        if odd := sorted(set(needed) ^ set(self.tensors.entries)):
            what = "is missing" if odd[0] in needed else f"is there, which {CONFIG_NAME} does not tell of"
            raise UserError(f"{self.path}: tensor {odd[0]!r} {what}; {_REMEDY}")
        for name, expected in needed.items():
            entry = self.tensors.entries[name]
            if entry.dtype != torch.float32 or (expected is not None and entry.shape != expected):
                as_said = "fp32" if expected is None else f"fp32 {expected}"
                raise UserError(
                    f"{entry.path}: tensor {name!r} is {str(entry.dtype).removeprefix('torch.')} {entry.shape}, but "
                    f"must be {as_said}; {_REMEDY}"
                )

    @property
    def base_model(self) -> str:
        return str(self.config["base_model"])

    @property
    def revision(self) -> str | None:
        return self.config["revision"]

    @property
    def task_type(self) -> str | None:
        return self.config["task_type"]

    def base_digest(self) -> str:
        return str(self.config["base_digest"])

    def base_storage(self) -> str:
        return str(self.config["base_storage"])

    def base_packed(self) -> list[str] | None:
        return self.config.get("base_packed")

    def modules_to_save(self) -> list[str]:
        return list(self.config["modules_to_save"])

    def lacking(self, modules: Iterable[str]) -> list[str]:
        return []  # a folder that is not whole is not opened

    def shape(self, module: str) -> Shape:
        return self.modules[module][1]

    def of_base(self, shapes: Mapping[str, Shape]) -> Self:
        return self

    def layer(self, module: str) -> NativeLayer:
        method, shape = self.modules[module]
        shared = self.config["layers"][module].get("shared", "")  # of folders that say it: matrices are drawn for this
        if shared and shared != method.shared_digest():
            raise UserError(
                f"{self.path}: what the layers of {method.title} share is not, number for number, what it was trained "
                f"with (at {module!r}); use the version of torch that it was trained with"
            )
        return NativeLayer(method, shape, {kind: self.read(f"{module}.{kind}") for kind in method.parameters(shape)})

    def read(self, name: str) -> Tensor:
        return self.tensors.read_finite(name)

    def read_whole(self) -> NativeAdapter:
        """Everything at once."""
        return NativeAdapter(
            layers={module: self.layer(module) for module in self.modules},
            trained=dict(trained_of(self)),
            source=self,
            **described(self),
        )


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json_object(path, _REMEDY)
    if config.get("format") != FORMAT:
        raise UserError(f"{path}: format = {config.get('format')!r}, this version reads {FORMAT}; {_REMEDY}")
    fine = {name: isinstance(config.get(name), str) for name in _TEXTS}
    fine |= {name: isinstance(config.get(name, 0), str | None) for name in ("revision", "task_type")}
    fine |= {name: _are_texts(config.get(name)) for name in ("modules_to_save", "trained")}
    fine["base_packed"] = config.get("base_packed") is None or _are_texts(config["base_packed"])
    fine["layers"] = isinstance(config.get("layers"), dict)
    if odd := [name for name, right in fine.items() if not right]:
        raise UserError(f"{path}: {odd[0]} = {config.get(odd[0])!r} is not what belongs there; {_REMEDY}")
    return config


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _layer(path: Path, module: str, said: Any) -> tuple[AdapterMethod, Shape]:
    match said:
        case {"shape": [int(out_features), int(in_features)], "method": dict(settings)} if min(said["shape"]) > 0:
            return of_settings(settings, f"{path}: layers[{module!r}].method"), (out_features, in_features)
    raise UserError(f"{path}: layers[{module!r}] = {said!r} must have a shape [out, in] and a method; {_REMEDY}")
