"""A mapping whose values are made when they are asked for, and not kept."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

Value = TypeVar("Value")


class OnDemand(Mapping[str, Value]):
    """`make` gives the value of one of `names`, again each time; memory stays that of one value."""

    def __init__(self, names: Collection[str], make: Callable[[str], Value]) -> None:
        self._names, self._make = names, make

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
