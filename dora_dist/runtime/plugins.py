"""Modules from outside of the package that register adapter methods, storages, tasks and model families."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from dora_dist.runtime.errors import UserError


def load(names: Sequence[str], field: str = "plugins") -> None:
    """Import the modules of these names, in order, each once in a process. Raises UserError, which names `field`.

    A module runs whatever code it holds. So only names that the user of this process gave may be passed, not those in
    a run folder, which can come from somebody else.
    """
    for name in names:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if not error.name or f"{name}.".startswith(f"{error.name}."):
                where = "install it, or name the folder that it is in in PYTHONPATH"
                raise UserError(f'{field} = "{name}": there is no such Python module; {where}') from None
            raise UserError(
                f'{field} = "{name}": needs the module {error.name}, which is missing; install it'
            ) from None
        except Exception as error:  # whatever the module's own code raises
            what = f"{type(error).__name__}: {error}"
            raise UserError(
                f'{field} = "{name}": cannot be imported ({what}); correct the module, or leave it out'
            ) from error


def files(names: Sequence[str]) -> dict[str, list[Path]]:
    """The Python files of loaded modules by name; those of a package are all below its folder."""
    found = {}
    for name in names:
        file = sys.modules[name].__file__
        path = Path(file) if file else None
        found[name] = [] if path is None else sorted(path.parent.rglob("*.py")) if path.stem == "__init__" else [path]
    return found
