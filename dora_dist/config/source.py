"""Reading a config file, JSON or YAML, and those that it extends, with the place of every mistake."""

import difflib
import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_dist.runtime import strict_json, strict_yaml
from dora_dist.runtime.errors import UserError

EXTENDS = "extends"
YAML = (".yaml", ".yml")
"""Endings of config files that are YAML; all others are JSON."""


@dataclass
class Source:
    """What config files say together: the values, and for each the file that it is from, by its keys."""

    raw: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def file_of(self, keys: tuple[str, ...]) -> Path | None:
        """The file that the value under `keys` is from, or the field it is in; None: no file (an option, a default)."""
        outermost = min(len(keys), 2)  # whoever began a section has not said all its fields
        ends = range(len(keys), outermost - 1, -1)
        return next((self.places[keys[:end]] for end in ends if keys[:end] in self.places), None)

    def forget(self, keys: tuple[str, ...]) -> None:
        """The value under `keys` is now another one, of no file."""
        self.places = {known: file for known, file in self.places.items() if known[: len(keys)] != keys}

    def lay_over(self, raw: Mapping[str, Any], file: Path) -> None:
        """Merge the values of a file that extends these: objects key by key, all else replaced, lists too.

        null is a field's value as any other. For a section, and for a key of a field that is an object, it means:
        without what was inherited.
        """
        self._lay_over(self.raw, raw, file, ())

    def _lay_over(self, below: dict[str, Any], above: Mapping[str, Any], file: Path, outer: tuple[str, ...]) -> None:
        for key, value in above.items():
            keys = (*outer, key)
            if value is None and len(outer) != 1 and key in below:
                del below[key]
                self.forget(keys)
            elif isinstance(value, dict) and isinstance(below.get(key), dict):
                self._lay_over(below[key], value, file, keys)
            else:
                self.forget(keys)
                below[key] = {} if isinstance(value, dict) else value
                self.places[keys] = file
                if isinstance(value, dict):
                    self._lay_over(below[key], value, file, keys)


def read(path: Path) -> Source:
    """The values of a config file over those of the files that it extends, first to last.

    `extends` names a file, or a list of them, relative to the file that says it. Raises UserError, naming the file.
    """
    found = Source()
    _read_over(found, path, ())
    return found


def _read_over(found: Source, path: Path, chain: tuple[Path, ...]) -> None:
    if os.path.realpath(path) in map(os.path.realpath, chain):
        circle = " -> ".join(map(str, (*chain, path)))
        raise UserError(f"{chain[-1]}: {EXTENDS} leads in a circle, {circle}; take one of them out")
    raw = read_file(path)
    for name in _extended(raw.pop(EXTENDS, []), path):
        parent = path.parent / os.path.expanduser(name)
        if not parent.exists():
            said = f'{EXTENDS} = "{name}": no such config file'
            raise UserError(f"{path}: {said} in {path.parent.absolute()}{nearby(parent)}")
        _read_over(found, parent, (*chain, path))
    found.lay_over(raw, path)


def _extended(value: Any, path: Path) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name and "\0" not in name for name in names):
        wanted = "must be a config file, or a list of them, relative to this one"
        raise UserError(f"{path}: {EXTENDS} = {json.dumps(value)[:80]}: {wanted}")
    return names


def read_file(path: Path) -> dict[str, Any]:
    """The object in a JSON or YAML file. Raises UserError with the place; repeated keys and NaN are mistakes too."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such config file{nearby(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give one JSON or YAML file{nearby(path / 'config.json')}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        raw = (strict_yaml if path.suffix.lower() in YAML else strict_json).parse(text)
    except strict_yaml.NotYaml as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        around = line[max(0, error.colno - 60) : error.colno + 40].strip()
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: {place}: not valid JSON: {error.msg}\n    {around}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        what = "one object with sections" if path.suffix.lower() in YAML else "one JSON object"
        raise UserError(f'{path}: must hold {what}, {{"model": {{...}}, "data": {{...}}, ...}}')
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
