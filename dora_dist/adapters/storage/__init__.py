"""Storages by name: what `model.storage` chooses from."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dora_dist.adapters.storage.base import StoredTensor, WeightStorage
from dora_dist.adapters.storage.int8 import Int8
from dora_dist.adapters.storage.nf4 import NF4
from dora_dist.adapters.storage.packed import PackedStorage
from dora_dist.adapters.storage.plain import PLAIN
from dora_dist.runtime.errors import UserError

__all__ = [
    "NF4",
    "PLAIN",
    "Int8",
    "PackedStorage",
    "StoredTensor",
    "WeightStorage",
    "as_held",
    "label",
    "labelled",
    "names",
    "register",
    "storage_of",
]

_STORAGES: dict[str, WeightStorage] = {}


def register(storage: WeightStorage) -> None:
    """Make `model.storage` know this storage. Raises ValueError if another one has its name."""
    if _STORAGES.setdefault(storage.name, storage) is not storage:
        raise ValueError(f"a storage named {storage.name!r} is registered already")


def names() -> list[str]:
    """The names of all storages that are registered."""
    return list(_STORAGES)


def storage_of(name: str, settings: Mapping[str, Any] | None = None, *, field: str = "model.storage") -> WeightStorage:
    """The storage of that name with these settings. Raises UserError, which names `field`, if there is none."""
    if name not in _STORAGES:
        known = ", ".join(_STORAGES)
        raise UserError(
            f'{field} = "{name}": no such storage (known: {known}); name the module that registers it in plugins'
        )
    return _STORAGES[name].with_settings(settings or {})


def label(storage: WeightStorage) -> str:
    """What says which storage held a base: its name, and where it has settings of its own, these as JSON.

    Adapters that say the name alone are read with the default settings, which therefore never change.
    """
    usual = storage_of(storage.name).settings()
    own = {name: value for name, value in storage.settings().items() if value != usual.get(name)}
    return f"{storage.name} {json.dumps(own)}" if own else storage.name


def labelled(text: str, field: str) -> WeightStorage:
    """The storage of a `label`, which `field` has. Raises UserError if there is none."""
    name, _, rest = text.partition(" ")
    try:
        settings = json.loads(rest or "{}")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{field} = {json.dumps(text)}: is not a storage and its settings; copy the folder again")
    return storage_of(name, settings, field=field)


def as_held(storage: WeightStorage, read: Callable[[int, int], Tensor], numel: int, *, span: tuple[int, int]) -> Tensor:
    """Elements [start, stop) = `span` of a weight of `numel` elements, fp32 and flat, as a layer computes with them.

    `read(start, stop)` gives the weight's own numbers, fp32; it is asked for whole records around the span.
    """
    start, stop = span
    first = start - start % storage.record
    last = min(-(-stop // storage.record) * storage.record, numel)
    return storage.round_trip(read(first, last))[start - first : stop - first]


register(PLAIN)
register(Int8())
register(NF4())
