"""A checkpoint of a method without adapters, as a saved adapter is: the base's own parameters, with other values.

Such a checkpoint has no adapter folder, which would hold everything that was trained a second time. What was trained is
read from its state, tensor by tensor, and what it is of from its manifest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from dora_dist.adapters.adapter_folder import SavedAdapter, SavedLayer, described, trained_of
from dora_dist.adapters.method import Shape
from dora_dist.adapters.native_format import NativeAdapter
from dora_dist.adapters.storage import PLAIN
from dora_dist.checkpoint.manifest import ADAPTER, is_complete, read_manifest
from dora_dist.checkpoint.state import Masters, open_state
from dora_dist.weights.safetensors_io import TensorFolder


def is_trained_weights(path: Path) -> bool:
    """Whether `path` is a complete checkpoint without an adapter."""
    return is_complete(path) and not (path / ADAPTER).is_dir()


@dataclass
class TrainedWeights:
    """As `adapter_folder.AdapterFolder` has it, with no adapted module."""

    path: Path
    tensors: TensorFolder
    trained: dict[str, str]
    model_config: dict[str, Any]
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> TrainedWeights:
        """Read a checkpoint's manifest and headers. Raises UserError where files are missing or damaged."""
        manifest, masters = read_manifest(path, verify=False), Masters(open_state(path))
        trained = {name: masters.stored(name) for name in masters}
        return cls(Path(path), masters.state, trained, manifest["model_config"], manifest)

    @property
    def modules(self) -> Collection[str]:
        return ()

    @property
    def base_model(self) -> str:
        return str(self._base["base_model"])

    @property
    def revision(self) -> str | None:
        revision: str | None = self._base["revision"]
        return revision

    @property
    def task_type(self) -> str | None:
        return self.manifest["task_type"]

    def base_digest(self) -> str:
        return str(self._base["base_digest"])

    def base_storage(self) -> str:
        return PLAIN.name

    def base_packed(self) -> list[str] | None:
        return None

    def modules_to_save(self) -> list[str]:
        return list(self.manifest["trained_modules"])

    def lacking(self, modules: Iterable[str]) -> list[str]:
        return []

    def of_base(self, shapes: Mapping[str, Shape]) -> Self:
        return self

    def shape(self, module: str) -> Shape:
        raise KeyError(module)

    def layer(self, module: str) -> SavedLayer:
        raise KeyError(module)

    def read(self, name: str) -> Tensor:
        return self.tensors.read_finite(name)

    def unread(self) -> SavedAdapter:
        """The same for a model to start from; a tensor is read when its turn comes, and not kept."""
        return NativeAdapter(layers={}, trained=trained_of(self), source=self, **described(self))

    @property
    def _base(self) -> Mapping[str, Any]:
        base: Mapping[str, Any] = self.manifest["base"]
        return base
