"""What may be a secret, known by its name, is left out of what is shown or sent elsewhere."""

import os
import re
from typing import Any

HIDDEN = "(not shown)"
_SECRET = re.compile(r"token(?!iz)|secret|passw|api_?key|credential", re.IGNORECASE)


def without_secrets(value: Any) -> Any:
    """A copy of plain data with HIDDEN for the values, at any depth, whose names say that they are secret."""
    if isinstance(value, dict):
        return {name: HIDDEN if _is_secret(str(name), part) else without_secrets(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(part) for part in value]
    return value


def _is_secret(name: str, value: Any) -> bool:
    """How many tokens, of text, are not."""
    return bool(_SECRET.search(name)) and not (name.endswith("tokens") and isinstance(value, int))


def redacted(text: str) -> str:
    """A message without the values of secrets that the environment has."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 3:
            text = text.replace(value, HIDDEN)
    return re.sub(r"//[^/@\s]+@", f"//{HIDDEN}@", text)
