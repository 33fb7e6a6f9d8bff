"""Reading a config file: plain JSON, with the place of every mistake."""

import difflib
import json
from pathlib import Path
from typing import Any, NoReturn

from dora_dist.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError with the place; repeated keys and NaN are mistakes too."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such config file{nearby(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give one JSON file{nearby(path / 'config.json')}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); give a JSON file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        raw = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text else ""
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: {place}: not valid JSON: {error.msg}\n    {line.strip()}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f'{path}: must hold one JSON object, {{"model": {{...}}, "data": {{...}}, ...}}')
    return raw


def nearby(path: Path) -> str:
    """`; did you mean X?` when the folder of a missing `path` holds a similar name, else nothing; of a link, where it
    leads.
    """
    if path.is_symlink():
        return f"; it is a link to {path.readlink()}, where nothing can be found"
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {folder / close[0]}?" if close else ""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f'the key "{repeated[0]}" is given twice in one section; keep one')
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number; give a finite value, or null")
