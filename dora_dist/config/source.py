"""Reading a config file: plain JSON, with the place of every mistake."""

import difflib
import errno
import json
import os
from pathlib import Path
from typing import Any

from dora_dist.runtime import strict_json
from dora_dist.runtime.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError with the place; repeated keys and NaN are mistakes too."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such config file{nearby(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give one JSON file{nearby(path / 'config.json')}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); give a JSON file, saved as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        raw = strict_json.parse(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        around = line[max(0, error.colno - 60) : error.colno + 40].strip()
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: {place}: not valid JSON: {error.msg}\n    {around}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f'{path}: must hold one JSON object, {{"model": {{...}}, "data": {{...}}, ...}}')
    return raw


def nearby(path: Path) -> str:
    """What to add to a message about a missing `path`: `; did you mean X?` where its folder holds a similar name, the
    target of a broken link, or nothing.
    """
    if path.is_symlink():
        return f"; it is a link to {path.readlink()}, where nothing can be found"
    folder = path.parent
    # A broken link of this name is in the folder, too, and is not meant.
    names = [entry.name for entry in folder.iterdir() if entry.name != path.name] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {folder / close[0]}?" if close else ""


def absence(path: Path, kind: str = "file") -> str:
    """Why `path` is not a file (or another `kind`): it is not there, is something else, or a link that is broken."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "links that lead in a circle"
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            return f"cannot be read ({error.strerror})"
        return f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else f"no such {kind}"
    return f"is not a {kind}"
