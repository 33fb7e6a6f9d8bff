"""Which tensors the merged model of an adapter and its base has: their names, dtypes, sources and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dora_dist.adapters.adapter_folder import AdapterFolder, agrees, packed_in_training
from dora_dist.adapters.patterns import outside
from dora_dist.models.build import skeleton
from dora_dist.models.families import family_of
from dora_dist.models.family import Family
from dora_dist.models.folder import DTYPES, FLOATS, ModelFolder
from dora_dist.models.heads import CAUSAL_LM, IMAGE_TEXT_TO_TEXT, head_of_adapter
from dora_dist.models.tying import names_of, parted_names, untie, untie_different
from dora_dist.runtime.errors import UserError
from dora_dist.weights.names import Rename, locate, modern, prefix_between, stored_names
from dora_dist.weights.safetensors_io import TensorEntry, TensorFolder


@dataclass(frozen=True)
class Output:
    """One tensor to write: its name and dtype there, where it is read, and the module whose update it gets.

    `packed` says that training saw it as a packed storage has it, whether or not it was adapted.
    """

    name: str
    dtype: torch.dtype
    source: TensorFolder
    entry: TensorEntry
    module: str | None = None
    packed: bool = False

    @property
    def nbytes(self) -> int:
        return self.entry.numel * self.dtype.itemsize


@dataclass
class Shard:
    """One output file: its tensors, in the order in which they are read, and their size once written."""

    name: str
    outputs: list[Output]
    nbytes: int


@dataclass(frozen=True)
class MergePlan:
    """What is to be written, in the order of the base's files: its tensors, adapted or replaced, then new ones.

    `untied` says that what config.json shares between modules is not shared: the adapter changes one use of it alone,
    or the base's files hold different values.
    """

    outputs: list[Output]
    untied: bool

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """The adapted modules, and the shapes (out, in) of their weights."""
        shapes = {output.module: output.entry.shape for output in self.outputs if output.module}
        return {module: (shape[0], shape[1]) for module, shape in shapes.items()}

    def shards(self, max_bytes: float) -> list[Shard]:
        """Files of up to `max_bytes` each, in the same order: the base is read sequentially."""
        shards: list[Shard] = []
        for output in self.outputs:
            if not shards or shards[-1].nbytes + output.nbytes > max_bytes:
                shards.append(Shard("model.safetensors", [], 0))
            shards[-1].outputs.append(output)
            shards[-1].nbytes += output.nbytes
        if len(shards) > 1:
            for number, shard in enumerate(shards, 1):
                shard.name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        return shards


def plan_merge(adapter: AdapterFolder, base: ModelFolder, dtype: str | None) -> MergePlan:
    """Match an adapter's modules and tensors with the base's; `dtype` as of `consolidate`.

    Raises UserError naming the first module that the base cannot take.
    """
    names = _names(adapter, base)
    entries = _entries(base.tensors, names)
    stored = stored_names(entries, names.rename)
    prefix = prefix_between([f"{module}.weight" for module in adapter.modules] or adapter.trained, stored)
    targets = _targets(adapter, base.path, entries, stored=stored, prefix=prefix)
    packed = _located(packed_in_training(adapter), stored, prefix)
    uses = [(name, use) for name in adapter.trained for use in names.tied.get(name, (name,))]
    replaced = {found: (name, use) for name, use in uses if (found := locate(use, stored, prefix))}
    lacks_prefix = all(not name.startswith(f"{prefix}.") for name in stored)
    outputs = []
    for own, entry in sorted(entries.items(), key=lambda item: (item[1].path, item[1].offset)):
        written_as = DTYPES[dtype] if dtype and entry.dtype in FLOATS else entry.dtype
        if own in replaced:
            trained, use = replaced[own]
            _check_replacement(adapter, trained, entry)
            outputs.append(_trained(adapter, trained, own if names.rename else use, dtype=written_as))
        else:
            name = f"{prefix}.{modern(own)}" if prefix and lacks_prefix else modern(own)
            name = own if names.rename or own not in base.tensors.entries else name
            outputs.append(Output(name, written_as, base.tensors, entry, targets.get(own), own in packed))
    new = [name for name in adapter.trained if name not in dict(replaced.values())]
    outputs += [_trained(adapter, name, name, dtype=_usual_dtype(outputs, adapter)) for name in new]
    return MergePlan(outputs, names.untied)


@dataclass(frozen=True)
class _Names:
    """What the base's model knows of its names: `rename` gives today's, for a model made of `parts`; its folder's own
    are what is written all the same. `parted` are the names of each weight of which the adapter changes one use alone;
    `tied` those of each that it changes in all of its uses, by the adapter's own name for it. `untied`: the merged
    model does not share what config.json says is shared.
    """

    rename: Rename | None = None
    parts: tuple[str, ...] = ()
    prefix: str = ""
    parted: tuple[list[str], ...] = ()
    tied: Mapping[str, Sequence[str]] = field(default_factory=dict)
    untied: bool = False


def _names(adapter: AdapterFolder, base: ModelFolder) -> _Names:
    # A weight that several modules share is an embedding or a head, never one of the numbered layers.
    outer = [module for module in adapter.modules if _is_outer(module)]
    changed, family = [*adapter.modules_to_save(), *outer], family_of(base.config["model_type"])
    single = outside(adapter.trained, changed)
    if not changed and not any(_is_outer(name) for name in single) and type(family).rename is Family.rename:
        return _Names()  # without building the model, which takes seconds
    head = head_of_adapter(adapter)
    if family.sees_pictures and head.task == CAUSAL_LM.task:  # which an adapter of nothing but lm_head looks like
        head = IMAGE_TEXT_TO_TEXT
    model = skeleton(base.path, head)
    # As training unties it: what the folder holds twice, with other values, and then what is changed in one use alone.
    rename = family.rename(model)
    different, stored = untie_different(model, base.tensors, stored_names(base.tensors.entries, rename))
    parted = tuple(names for _, names in parted_names(model, changed))
    untie(model, changed, stored)
    tied = {name: found for name in single if len(found := names_of(model, name)) > 1}
    return _Names(rename, family.parts, model.base_model_prefix, parted, tied, bool(different or parted))


def _is_outer(name: str) -> bool:
    return not any(part.isdigit() for part in name.split("."))


def _entries(tensors: TensorFolder, names: _Names) -> dict[str, TensorEntry]:
    """What the base has, by name there; and again by every other name of what the adapter parts."""
    entries, stored = dict(tensors.entries), stored_names(tensors.entries, names.rename)
    for shared in names.parted:
        found = {name: locate(name, stored, names.prefix) for name in shared}
        if source := next(filter(None, found.values()), None):
            for name in (name for name in shared if not found[name]):
                entries[_own_name(name, tensors.entries, names)] = tensors.entries[source]
    return entries


def _own_name(name: str, entries: Iterable[str], names: _Names) -> str:
    """A name as the folder would have it: older than today's where the others of its part of the model are."""
    there = {own.partition(".")[0] for own in entries}
    older = [f"{part}.{name}" for part in names.parts if part in there]
    return next((own for own in older if names.rename and names.rename(own) == name), name)


def _targets(
    adapter: AdapterFolder, base: Path, entries: Mapping[str, TensorEntry], *, stored: Mapping[str, str], prefix: str
) -> dict[str, str]:
    """Name in `entries` -> adapted module."""
    targets = {}
    for module in adapter.modules:
        weight, who = f"{module}.weight", f"{adapter.path}: it adapts {module!r}"
        own = locate(weight, stored, prefix) or weight
        entry = entries.get(own)
        if entry is None:
            missing = f"but {base} has no tensor {weight!r}"
            raise UserError(f"{who}, {missing}; give the base that it was trained on")
        if not agrees(adapter.shape(module), entry.shape):
            mismatch = f"as {adapter.shape(module)}, but {base} has it as {entry.shape}"
            raise UserError(f"{who} {mismatch}; give the base that it was trained on")
        targets[own] = module
    return targets


def _located(modules: Iterable[str], stored: Mapping[str, str], prefix: str) -> set[str]:
    """The weights of `modules` by their names in the folder, those that it has."""
    return {own for module in modules if (own := locate(f"{module}.weight", stored, prefix))}


def _trained(adapter: AdapterFolder, trained: str, name: str, *, dtype: torch.dtype) -> Output:
    """A tensor that was trained in full, as `name`."""
    return Output(name, dtype, adapter.tensors, adapter.tensors.entries[adapter.trained[trained]])


def _usual_dtype(outputs: Sequence[Output], adapter: AdapterFolder) -> torch.dtype:
    """That of the weights that are adapted or replaced, or else of any weight; never that of positions or masks."""
    weights = [output for output in outputs if output.dtype in FLOATS]
    changed = [output for output in weights if output.module or output.source is adapter.tensors]
    return next((output.dtype for output in [*changed, *weights]), torch.float32)


def _check_replacement(adapter: AdapterFolder, name: str, entry: TensorEntry) -> None:
    shape = adapter.tensors.entries[adapter.trained[name]].shape
    if shape != entry.shape and not adapter.model_config:  # a head may have another number of labels
        mismatch = f"as {shape}, but {entry.path.parent} has it as {entry.shape}"
        raise UserError(f"{adapter.path}: it trained {name!r} {mismatch}; give the base that it was trained on")
