"""What is asked of a saved adapter, whatever the format of its folder: unread and checked, or in memory.

PEFT's format is in `peft_folder.py` and `peft_format.py`, our own in `native_format.py`; `folders.py` knows both.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor

from dora_dist.adapters.method import AdapterMethod, Shape
from dora_dist.adapters.storage import PLAIN, WeightStorage, labelled
from dora_dist.runtime.on_demand import OnDemand
from dora_dist.weights.safetensors_io import TensorFolder

MODEL_CONFIG_NAME = "model_config.json"
"""Fields that a model's config.json has in addition to its base's (its head's labels); PEFT does not look at it."""


StatedShape = tuple[int, int | None]
"""(out, in), None for what a folder does not say."""


def agrees(stated: StatedShape, found: tuple[int, ...]) -> bool:
    """Whether a weight's shape is the one that an adapter's folder says, as far as it says it."""
    return len(found) == 2 and all(said in (None, there) for said, there in zip(stated, found, strict=True))


class SavedLayer(Protocol):
    """One adapted module as a folder has it, read."""

    @property
    def shape(self) -> StatedShape:
        """(out, in) of the weight that it was trained on."""
        ...

    def merge_rows(self, weight: Tensor, start: int) -> None:
        """Merge it into rows [start, start + len(weight)) of the base weight, fp32 (rows, in), in place."""
        ...

    def odd_magnitudes(self) -> int:
        """How many magnitudes are below 0, or 0 where the base's row is not, as far as is known without the base."""
        ...


class AdapterFolder(Protocol):
    """A folder that was checked but not read: `layer` and `read` read one module or tensor, so memory stays small."""

    path: Path
    tensors: TensorFolder
    trained: dict[str, str]
    """Parameters trained in full, by their names in the model: their names in the file."""
    model_config: dict[str, Any]

    @property
    def modules(self) -> Collection[str]:
        """The adapted modules, by their names in the base."""
        ...

    @property
    def base_model(self) -> str:
        """The folder or hub name of the base; "" where the folder does not say."""
        ...

    @property
    def revision(self) -> str | None: ...

    @property
    def task_type(self) -> str | None:
        """PEFT's word for what the model is for."""
        ...

    def base_digest(self) -> str:
        """The digest of the base that it was trained on; "" where the folder does not say."""
        ...

    def base_storage(self) -> str:
        """The label of the storage that held the base in training: the adapter fits the weights as that has them."""
        ...

    def base_packed(self) -> list[str] | None:
        """The modules whose weight that storage held, adapted or not; None where the folder does not say."""
        ...

    def modules_to_save(self) -> list[str]:
        """The modules whose parameters are in `trained`, by their whole names."""
        ...

    def lacking(self, modules: Iterable[str]) -> list[str]:
        """Those of the base's linear `modules` that should have tensors here and have none."""
        ...

    def shape(self, module: str) -> StatedShape:
        """(out, in) of the weight that `module` must have in the base."""
        ...

    def of_base(self, shapes: Mapping[str, Shape]) -> Self:
        """The folder once the whole shapes of its modules are known, which `layer` may need. Raises UserError."""
        ...

    def layer(self, module: str) -> SavedLayer:
        """Read one module. Raises UserError, naming the tensor, where a number is not finite."""
        ...

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the file, fp32. Raises UserError, naming it, where it is not finite."""
        ...


def described(folder: AdapterFolder) -> dict[str, Any]:
    """Those fields of a `SavedAdapter` that say what it is of, as its folder has them."""
    return {
        "base_model": folder.base_model,
        "revision": folder.revision,
        "task_type": folder.task_type,
        "modules_to_save": folder.modules_to_save(),
        "model_config": folder.model_config,
        "base_digest": folder.base_digest(),
        "base_storage": folder.base_storage(),
        "base_packed": folder.base_packed(),
    }


def storage_in_training(folder: AdapterFolder) -> WeightStorage:
    """The storage that `base_storage` labels. Raises UserError if there is none."""
    return labelled(folder.base_storage(), f"{folder.path}: the base's storage")


def packed_in_training(folder: AdapterFolder) -> Collection[str]:
    """The modules whose weight is not the base's own, but what `base_storage` makes of it: see `base_packed`.

    Folders that do not say are of a time when adapted modules alone were packed.
    """
    if folder.base_storage() == PLAIN.name:
        return ()
    said = folder.base_packed()
    return folder.modules if said is None else said


def trained_of(folder: AdapterFolder) -> Mapping[str, Tensor]:
    """What was trained in full, by the parameters' names in the model; each is read when it is asked for."""
    return OnDemand(folder.trained, lambda name: folder.read(folder.trained[name]))


@dataclass(kw_only=True)
class AdapterFields:
    """What an adapter in memory has whatever its format; fields as of the folder.

    `modules_to_save` are modules trained in full, `trained` their parameters and single ones by their names in the
    model, fp32; `stored` those that are not in memory but in a folder, under another name there.
    """

    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"
    modules_to_save: list[str] = field(default_factory=list)
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    stored: dict[str, tuple[TensorFolder, str]] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)
    base_digest: str = ""
    base_storage: str = PLAIN.name
    base_packed: list[str] | None = None


class SavedAdapter(Protocol):
    """An adapter in memory (`AdapterFields`): what a run starts from, and what is put on a base to evaluate it."""

    base_model: str
    revision: str | None
    task_type: str | None
    modules_to_save: list[str]
    trained: Mapping[str, Tensor]
    model_config: dict[str, Any]
    base_digest: str
    base_storage: str
    base_packed: list[str] | None

    @property
    def layers(self) -> Mapping[str, SavedLayer]: ...

    @property
    def source(self) -> AdapterFolder | None:
        """The folder that it was read from."""
        ...

    def methods(self) -> dict[str, AdapterMethod]:
        """The method that each module was trained with."""
        ...

    def differences(self, module: str, method: AdapterMethod) -> Iterator[str]:
        """Why `module` cannot be the start of a layer with `method`, each with a remedy."""
        ...

    def values(self, module: str, method: AdapterMethod, base_norm: Tensor | None) -> Mapping[str, Tensor]:
        """Values of the parameters of a layer with `method`, which gives the function that `module` has here."""
        ...

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the folder `path`. Raises UserError where it exists, unless `overwrite`, or cannot be written."""
        ...
