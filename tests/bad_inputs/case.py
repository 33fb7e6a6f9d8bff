"""A row of the tables: what is typed, in a folder made for it, and what the answer must be."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_dist.runtime.exit_codes import USERS_MISTAKE
from tests import toy
from tests.distributed.training_runs import config, train_file
from tests.ranks import run_ranks

FOUR_STEPS = {"training": {"max_steps": 4}, "checkpoint": {"save_every": 2}}
Words = list[str]  # what follows `dora-dist` on a command line


class Folder:
    """An empty folder for one case, and what cases put there. Commands are run from inside of it."""

    def __init__(self, path: Path, toys: Path) -> None:
        self.path, self._toys = path, toys

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def base(self, name: str = "base") -> Path:
        """A toy LLaMA of this case's own, to be spoilt."""
        return Path(shutil.copytree(self._toys / "base", self.path / name, dirs_exist_ok=True))

    def made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """What `make` puts into a folder called `name`, which it does once for all cases; this case's own copy."""
        if not (self._toys / name).exists():
            make(self._toys / name)
        return Path(shutil.copytree(self._toys / name, self.path / name, dirs_exist_ok=True))

    def data(self, name: str = "data.json", count: int = 25) -> Path:
        """Records in the paper's format."""
        return toy.write_records(self.path / name, count)

    def text(self, name: str, text: str | bytes) -> Path:
        """A file with this content."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return file

    def trained(self, *options: str, **sections: dict[str, Any]) -> Words:
        """`train` that goes on with --resume after four steps of a run that saved twice, whose folder is here."""
        source = self._toys / "trained"
        if not source.exists():
            first = Folder(source, self._toys)
            first.run(**FOUR_STEPS)
            run_ranks(train_file, 1, source / "config.json")
        shutil.copytree(source, self.path, dirs_exist_ok=True)
        merged = {name: {**FOUR_STEPS.get(name, {}), **sections.get(name, {})} for name in {*FOUR_STEPS, *sections}}
        return self.run("--resume", *options, **merged)

    def edited(self, name: str, **fields: Any) -> Path:
        """The JSON file `name` with these fields set."""
        return self.text(name, json.dumps({**json.loads((self / name).read_text()), **fields}))

    def run(self, *options: str, **sections: dict[str, Any]) -> Words:
        """`train` on two toy steps with a config file that has these sections merged in; toys are made if missing."""
        base, data = self / "base", self / "data.json"
        if not base.exists():
            self.base()
        if not data.exists():
            self.data()
        sections["training"] = {"max_steps": 2, "warmup_steps": 0, **sections.get("training", {})}
        raw = config(Path(base.name), Path(data.name), Path("run"), **sections)
        self.text("config.json", json.dumps(raw))
        return ["train", "--config", "config.json", *options]


@dataclass(frozen=True)
class Case:
    """One bad input.

    `make` fills the folder and returns the commands to run there, one after the other; all but the last must
    succeed. The last ends with `code`, and every rank of every world size in `ranks` says everything in `says` (rank
    0 alone, if it goes on: then they are warnings). No rank may show a traceback.
    """

    name: str
    make: Callable[[Folder], Words | list[Words]]
    says: tuple[str, ...]
    code: int = USERS_MISTAKE
    ranks: tuple[int, ...] = (1,)

    def commands(self, folder: Folder) -> list[Words]:
        """Fill the folder; what to run there."""
        made = self.make(folder)
        return [made] if isinstance(made[0], str) else made


class Table(list[Case]):
    """The cases of one area. `option` adds those that one option makes; `bad` decorates a function that makes one."""

    def option(
        self,
        name: str,
        *options: str,
        says: str | tuple[str, ...],
        code: int = USERS_MISTAKE,
        ranks: tuple[int, ...] = (1,),
    ) -> None:
        """A toy run with these options on the command line."""
        self.append(Case(name, lambda folder: folder.run(*options), _several(says), code, ranks))

    def bad(
        self, says: str | tuple[str, ...], code: int = USERS_MISTAKE, ranks: tuple[int, ...] = (1,)
    ) -> Callable[[Callable[[Folder], Any]], Callable[[Folder], Any]]:
        """A case named as the function is."""

        def add(make: Callable[[Folder], Any]) -> Callable[[Folder], Any]:
            self.append(Case(make.__name__, make, _several(says), code, ranks))
            return make

        return add


def _several(says: str | tuple[str, ...]) -> tuple[str, ...]:
    return (says,) if isinstance(says, str) else says
