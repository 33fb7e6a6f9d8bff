"""What a name in a configuration means: something here, or something on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

TABLES = (".csv", ".tsv")
TYPED = (".json", ".jsonl", ".parquet")
"""Endings of files whose values have types; a table's are all texts."""
GZIP = ".gz"
DATA_SUFFIXES = (*TYPED, *TABLES, *(f"{kind}{GZIP}" for kind in (".json", ".jsonl", *TABLES)))
DATA_KINDS = ".json, .jsonl, .parquet, .csv, .tsv, or .json.gz, .jsonl.gz, .csv.gz, .tsv.gz"
SHEETS = (".xlsx", ".xls", ".ods", ".txt")
PACKED = (".gz", ".zip", ".xz", ".bz2", ".zst", ".tar", ".tgz", ".7z")
"""Endings of files that records are not read from, which are not taken for names on the hub either."""
PEFT_ADAPTER, OWN_ADAPTER = "adapter_config.json", "dora_dist_adapter.json"
"""The file that an adapter folder is known by: PEFT's, or our own for what PEFT has no format for."""
SPEAKERS = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names that roles have in other collections of conversations, and ours."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_local(name: str) -> bool:
    """Whether a model or tokenizer `name` means a file or folder here rather than a hub name (org/model)."""
    return (
        name.startswith((".", "/", "~"))
        or not _HUB_NAME.fullmatch(name)
        or name.endswith((*DATA_SUFFIXES, ".model", ".gguf", ".safetensors"))
        or os.path.lexists(name)  # also a broken link
    )


Sources = Any
"""What a field of sources holds: a name, several, either for each of several tasks, or a mixture (config/mixture.py);
None: nothing."""


def listed(sources: Sources) -> list[str]:
    """All names in a field of sources."""
    if isinstance(sources, Mapping):
        return [name for names in sources.values() for name in listed(names)]
    if isinstance(sources, str):
        return [sources]
    return [name for each in sources or [] for name in ([each] if isinstance(each, str) else listed(each.path))]


def by_task(sources: Sources) -> dict[str, list[str]]:
    """The names of each task; none where a field of sources does not say them by task."""
    return {task: listed(names) for task, names in sources.items()} if isinstance(sources, Mapping) else {}


def of_task(value: T | Mapping[str, T], task: str) -> T:
    """What a field says for a task: the same for all, or for each its own. KeyError: nothing for this one."""
    return value[task] if isinstance(value, Mapping) else value


def largest(value: int | Mapping[str, int]) -> int:
    """The largest number of a field that `of_task` reads."""
    return max(value.values()) if isinstance(value, Mapping) else value


class DataSet(NamedTuple):
    """A data set that a source names: REPOSITORY, REPOSITORY:CONFIG, REPOSITORY:CONFIG:SPLIT or REPOSITORY:FILE.

    The repository is a hub name, or a folder with the files of one.
    """

    repository: str
    config: str | None = None
    split: str | None = None
    file: str | None = None

    @property
    def is_here(self) -> bool:
        return Path(self.repository).is_dir()

    def looks_whole(self) -> bool:
        """Whether the folder holds the named file, or any data file at all."""
        folder = Path(self.repository)
        if self.file:
            return (folder / self.file).is_file()
        return any(path.name.endswith(DATA_SUFFIXES) for path in folder.rglob("*"))


def data_set(source: str) -> DataSet | None:
    """The data set that a data `source` names; None if the source is a file, be it there or not."""
    repository, _, rest = source.partition(":")
    a_file = Path(source).is_file() or repository.endswith((*DATA_SUFFIXES, *SHEETS, *PACKED))
    if a_file or not (Path(repository).is_dir() or (_HUB_NAME.fullmatch(repository) and repository[0] != ".")):
        return None
    if rest.endswith(DATA_SUFFIXES):
        return DataSet(repository, file=rest)
    config, _, split = rest.partition(":")
    return DataSet(repository, config or None, split or None)
