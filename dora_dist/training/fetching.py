"""From the hub to this node: the hub names in a configuration become folders and files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from dora_dist.config import DataConfig, RunConfig, is_local
from dora_dist.config.mixture import mixture_of, named, replaced
from dora_dist.config.names import Sources, data_set, listed
from dora_dist.data.repository import data_files
from dora_dist.runtime.distributed import World, together
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.hub import CODE, TEXTS, NotReached, Repository, by_hand, wanted

_SPLITS = ("train", "validation")
_LONGEST_DOWNLOAD = timedelta(days=1)


def _splits(data: DataConfig) -> tuple[str, ...]:
    """The fields whose files come here before the run; those of a stream are read where they are."""
    return ("validation",) if data.streaming else _SPLITS


def fetched_for_data(config: RunConfig) -> RunConfig:
    """As `fetched`, for a process that only reads the data: of the model no weights are fetched."""
    return _placed(config, weights=False)


def fetched(config: RunConfig, world: World) -> RunConfig:
    """The run with paths on this node for all hub names in it (collective).

    One rank of each node downloads into the hub's cache, which locks and verifies each file, so that nodes may share
    it; the other ranks wait, then find the same there without asking the hub. Raises UserError on every rank.
    """
    sources = [source for split in _splits(config.data) for source in listed(getattr(config.data, split))]
    if not any(map(data_set, sources)) and not any(_repositories(config)):
        return config
    with together("fetching what the run needs from the hub", patience=_LONGEST_DOWNLOAD):
        if world.local_rank == 0:
            _placed(config)
    with together("finding what was fetched from the hub"):
        return _placed(config, local_only=True)
    raise AssertionError("unreachable: together() raises or passes on")


def _placed(config: RunConfig, local_only: bool = False, weights: bool = True) -> RunConfig:
    model, data = config.model, config.data
    try:
        places = {
            repository.field.removeprefix("model."): str(repository.fetch(local_only))
            for repository in _repositories(config, weights)
            if repository.kind == "model"
        }
        sources = {
            split: _found(getattr(data, split), split, local_only)
            for split in _splits(data)
            if getattr(data, split) is not None
        }
    except NotReached as error:
        there = " ".join(f"--{field} {shlex.quote(value)}" for field, value in _by_hand_options(config).items())
        raise UserError(f"{error}.\n{by_hand(list(_repositories(config)), there)}") from error
    return config.model_copy(update={"model": model.model_copy(update=places), "data": data.model_copy(update=sources)})


def _found(sources: Sources, split: str, local_only: bool) -> Any:
    """The files of a field of sources, by task where it is."""
    if isinstance(sources, Mapping):
        return {task: _found(names, split, local_only) for task, names in sources.items()}
    if mixture_of(sources):
        # Named first: a data set's files are called as all others are, "train-00000-of-00001".
        return replaced(named(sources), lambda path: _found(path, split, local_only))
    return [file for name in listed(sources) for file in _files(name, split, local_only)]


def _files(source: str, split: str, local_only: bool) -> list[str]:
    named = data_set(source)
    if named is None:
        return [source]
    return [str(file) for file in data_files(named, split, field=f"data.{split}", local_only=local_only)]


def _repositories(config: RunConfig, weights: bool = True) -> Iterator[Repository]:
    """Everything on the hub that the run names, the model's weights if they are wanted."""
    model = config.model
    texts = (*TEXTS, *CODE) if model.trust_remote_code else TEXTS
    if not is_local(model.path):
        patterns = wanted(model.trust_remote_code) if weights else texts
        yield Repository(model.path, revision=model.revision, patterns=patterns)
    if model.tokenizer is not None and not is_local(model.tokenizer):
        yield Repository(model.tokenizer, patterns=texts, field="model.tokenizer")
    for split in _splits(config.data):
        for source in listed(getattr(config.data, split)):
            if (named := data_set(source)) and not named.is_here:
                patterns = (named.file,) if named.file else ()
                yield Repository(named.repository, "dataset", patterns=patterns, field=f"data.{split}")


def _by_hand_options(config: RunConfig) -> dict[str, str]:
    """The options that name the folders of downloads by hand, in place of the hub names."""
    options = {r.field: r.folder for r in _repositories(config) if r.kind == "model"}
    for split in _SPLITS:
        sources = getattr(config.data, split)
        named = _by_hand_sources(sources)
        if listed(named) != listed(sources):
            options[f"data.{split}"] = named if isinstance(named, str) else json.dumps(named, default=_plain)
    return options


def _plain(source: Any) -> Any:
    return source.model_dump(exclude_defaults=True)


def _by_hand_sources(sources: Sources) -> Any:
    if isinstance(sources, Mapping):
        return {task: _by_hand_sources(names) for task, names in sources.items()}
    if mixture_of(sources):
        return replaced(sources, _by_hand_sources)
    named = [_by_hand_source(source) for source in listed(sources)]
    return named[0] if len(named) == 1 else named


def _by_hand_source(source: str) -> str:
    named = data_set(source)
    if named is None or named.is_here:
        return source
    folder, rest = Repository(named.repository, "dataset").folder, source.removeprefix(named.repository)
    return f"{folder}/{named.file}" if named.file else folder + rest
