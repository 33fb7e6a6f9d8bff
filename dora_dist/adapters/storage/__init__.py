"""Storages by name: what `model.storage` chooses from."""

from collections.abc import Callable

from torch import Tensor

from dora_dist.adapters.storage.base import StoredTensor, WeightStorage
from dora_dist.adapters.storage.packed import PackedStorage
from dora_dist.adapters.storage.plain import PLAIN
from dora_dist.runtime.errors import UserError

__all__ = ["PLAIN", "PackedStorage", "StoredTensor", "WeightStorage", "as_held", "register", "storage_of"]

_STORAGES: dict[str, WeightStorage] = {}


def register(storage: WeightStorage) -> None:
    """Make `model.storage` know this storage. Raises ValueError if another one has its name."""
    if _STORAGES.setdefault(storage.name, storage) is not storage:
        raise ValueError(f"a storage named {storage.name!r} is registered already")


def storage_of(name: str, field: str = "model.storage") -> WeightStorage:
    """The storage of that name. Raises UserError, which names `field`, if there is none."""
    if name not in _STORAGES:
        known = ", ".join(_STORAGES)
        raise UserError(
            f'{field} = "{name}": no such storage (known: {known}); name the module that registers it in plugins'
        )
    return _STORAGES[name]


def as_held(storage: WeightStorage, read: Callable[[int, int], Tensor], numel: int, *, span: tuple[int, int]) -> Tensor:
    """Elements [start, stop) = `span` of a weight of `numel` elements, fp32 and flat, as a layer computes with them.

    `read(start, stop)` gives the weight's own numbers, fp32; it is asked for whole records around the span.
    """
    start, stop = span
    first = start - start % storage.record
    last = min(-(-stop // storage.record) * storage.record, numel)
    return storage.round_trip(read(first, last))[start - first : stop - first]


register(PLAIN)
