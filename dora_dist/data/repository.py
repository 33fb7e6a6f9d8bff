"""The files of a data set: of a repository on the hub, or of a folder that holds one. No code in it is run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dora_dist.config.names import DATA_KINDS, DATA_SUFFIXES, TYPED, DataSet
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.hub import RemoteFile, Repository

CARD = "README.md"  # it says which files are which configuration and split
CONVERTED = "refs/convert/parquet"
"""The branch where the hub keeps public data sets as Parquet, CONFIG/SPLIT/*.parquet, whatever their own files are."""


def data_files(data: DataSet, split: str = "train", *, field: str = "data", local_only: bool = False) -> list[Path]:
    """The files with the records of one split of a data set, on this machine.

    `split` counts where `data` names none. From the hub only these files are fetched (`local_only`: found in the
    cache), all of one commit. Raises NotReached if the hub does not answer, and UserError, naming `field`, for a
    repository, configuration, split or file that is not there.
    """
    label = f"{field} = {data.repository!r}"
    if data.is_here:
        return _found(Path(data.repository), data, split, label)
    repository = Repository(data.repository, "dataset", patterns=(data.file or CARD,), field=field)
    folder = repository.fetch(local_only)
    if data.file:
        return _found(folder, data, split, label)
    of_card = _patterns(folder, data, split, label)

    def fetched(kinds: tuple[str, ...]) -> list[Path]:
        patterns = (CARD, *(of_card or (f"*{kind}" for kind in kinds)))
        whole = replace(repository, revision=folder.name, patterns=patterns).fetch(local_only)
        return _found(whole, data, split, label, kinds=kinds)

    try:
        return fetched(TYPED)
    except _NoData:  # tables, archives, or a program that makes them, which is not run
        converted = replace(repository, revision=CONVERTED, patterns=("*.parquet",))
    try:
        return _found(converted.fetch(local_only), data, split, label)  # with types, which tables do not have
    except UserError as error:
        try:
            return fetched(DATA_SUFFIXES)
        except _NoData:
            raise UserError(f"{label}: has no {DATA_KINDS} files ({error})") from error


def remote_files(data: DataSet, split: str = "train", *, field: str = "data") -> list[RemoteFile]:
    """As `data_files`, of a data set on the hub, of which the card alone is fetched."""
    label = f"{field} = {data.repository!r}"
    repository = Repository(data.repository, "dataset", patterns=(CARD,), field=field)

    def found(kinds: tuple[str, ...], revision: str | None = None) -> list[RemoteFile]:
        commit, names = replace(repository, revision=revision).listed()
        with TemporaryDirectory() as made:  # the same names without their content: they say which files are a split
            folder = Path(made).resolve()
            for name in names:
                path = folder / _inside(name, label)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            if CARD in names:
                card = replace(repository, revision=commit).fetch() / CARD
                (folder / CARD).write_bytes(card.read_bytes())
            files = _found(folder, data, split, label, kinds=kinds)
            paths = [file.relative_to(folder).as_posix() for file in files]
            return [RemoteFile(data.repository, commit, path, names[path]) for path in paths]

    if data.file:
        return found(DATA_SUFFIXES)
    try:
        return found(TYPED)
    except _NoData:
        pass
    try:
        return found((".parquet",), CONVERTED)
    except UserError as error:
        try:
            return found(DATA_SUFFIXES)
        except _NoData:
            raise UserError(f"{label}: has no {DATA_KINDS} files ({error})") from error


class _NoData(UserError):
    """No file in the folder of a data set can be read."""


def _found(
    folder: Path, data: DataSet, split: str, label: str, *, kinds: tuple[str, ...] = DATA_SUFFIXES
) -> list[Path]:
    if data.file:
        patterns: tuple[str, ...] | None = (_inside(data.file, label),)
    else:
        patterns = _patterns(folder, data, split, label)
    found = sorted(_named(folder, patterns) if patterns else _guessed(folder, data, split, label, kinds=kinds))
    if any(not path.name.endswith(kinds) for path in found):
        found = []
    if not found:
        what = f"file {data.file}" if data.file else f"{DATA_KINDS} file for its split {split!r}"
        raise _NoData(f"{label}: has no {what}")
    return found


def _named(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def _guessed(folder: Path, data: DataSet, split: str, label: str, *, kinds: tuple[str, ...]) -> list[Path]:
    """The files of a split where no card names them: by the names of files and folders, as the hub guesses them."""
    from datasets import load_dataset_builder

    folders = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    alone = folders[0] if len(folders) == 1 and not any(folder.glob("*.*")) else ""
    if data.config is not None and data.config not in folders:
        raise UserError(_choose(label, data, "configuration", data.config, folders))
    try:
        files = load_dataset_builder(str(folder / (data.config or alone))).config.data_files
    except (OSError, ValueError, RuntimeError) as error:
        raise _NoData(f"{label}: {str(error).splitlines()[0]}") from error
    files = {str(name): [Path(file) for file in listed] for name, listed in (files or {}).items()}
    if any(not path.name.endswith(kinds) for listed in files.values() for path in listed):
        return []
    wanted = data.split or split
    if wanted not in files:
        raise UserError(_choose(label, data, "split", wanted, list(files)))
    return files[wanted]


def _patterns(folder: Path, data: DataSet, split: str, label: str) -> tuple[str, ...] | None:
    """The files of a split as the repository's card names them; None if it names none."""
    configs = _configurations(folder / CARD, label)
    if not configs:
        return None
    default = [name for name, config in configs.items() if config.get("default") or name == "default"]
    name = data.config or (default or list(configs))[0]
    if name not in configs or (data.config is None and not default and len(configs) > 1):
        raise UserError(_choose(label, data, "configuration", data.config, list(configs)))
    splits = _splits(configs[name]["data_files"])
    wanted = data.split or split
    if wanted not in splits:
        raise UserError(_choose(label, data, "split", wanted, list(splits)))
    return tuple(_inside(pattern, label) for pattern in splits[wanted])


def _configurations(card: Path, label: str) -> dict[str, Mapping[str, Any]]:
    from huggingface_hub import DatasetCard

    if not card.is_file():
        return {}
    try:
        configs = DatasetCard.load(card).data.to_dict().get("configs") or []
        return {config["config_name"]: config for config in configs if config.get("data_files")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{label}: its {CARD} says of its files what cannot be read: {error}") from error


def _splits(files: Any) -> dict[str, list[str]]:
    """`data_files` of a card, which may be one file, several, or several with their splits."""
    listed = files if isinstance(files, list) else [files]
    splits: dict[str, list[str]] = {}
    for entry in listed:
        name, paths = (entry.get("split", "train"), entry["path"]) if isinstance(entry, dict) else ("train", entry)
        splits.setdefault(str(name), []).extend([paths] if isinstance(paths, str) else paths)
    return splits


def _inside(pattern: str, label: str) -> str:
    """A file's name, or a pattern, that cannot leave the repository's folder."""
    if Path(pattern).is_absolute() or ".." in re.split(r"[/\\]", pattern):
        raise UserError(f"{label}: {pattern!r} is outside of its folder")
    return pattern.removeprefix("./")


def _choose(label: str, data: DataSet, what: str, given: str | None, there: list[str]) -> str:
    missing = f"has no {what} {given!r}" if given else f"has several {what}s"
    first = there[0] if there else what.upper()
    example = (
        f"{data.repository}:{first}" if what == "configuration" else f"{data.repository}:{data.config or ''}:{first}"
    )
    return f"{label}: {missing}; it has {', '.join(there) or 'none'} (say which: {example})"
