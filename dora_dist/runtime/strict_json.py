"""JSON that means the same to every reader: what only Python accepts, or resolves silently, is an error."""

import json
import math
from typing import Any, NoReturn

_MOST_DIGITS = 300  # a number of more does not fit into a float
_MOST_LEVELS = 100
_TOO_DEEP = f"brackets are nested more than {_MOST_LEVELS} levels deep; take some out"


def parse(text: str) -> Any:
    """The value in JSON `text`. Raises JSONDecodeError for what is not JSON.

    Raises ValueError, saying what, for repeated keys, NaN, Infinity, numbers that no float can hold, and nesting
    deeper than 100 levels.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_constant=_no_constant,
            parse_float=finite,
            parse_int=whole,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return bounded(value)


def bounded(value: Any, most: float = math.inf) -> Any:
    """`value` itself. Raises ValueError where it has more than `most` values in it, or more than 100 levels."""
    level, count = [value], 1
    for _ in range(_MOST_LEVELS):
        level = [inner for outer in level for inner in _members(outer)]
        count += len(level)
        if count > most:
            raise ValueError(f"has more than {most:,} values; take some out")
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


def _members(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{repeated}" is given twice in one section; keep one')
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number; give a finite value, or null")


def finite(text: str) -> float:
    """The number that `text` is. Raises ValueError where no float can hold it."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large for a number; give a finite value, or null")
    return value


def whole(text: str) -> int:
    """The whole number that `text` is. Raises ValueError for one of very many digits."""
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{text[:12]}... has {len(text):,} digits; give a smaller number")
    return int(text)
