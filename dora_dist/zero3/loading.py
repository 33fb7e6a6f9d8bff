"""Loading a base model: each process reads its own elements from safetensors, straight into where they will live.

A flat row-major shard is one contiguous byte range of its tensor in the file, so a rank of N reads 1/N of every
tensor's bytes, no rank holds a whole tensor, and no weight is broadcast.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dora_dist.adapters.linear import ADAPTER_PARAMETERS, DoraLinear, initial_bound
from dora_dist.errors import UserError
from dora_dist.models.placement import Fill, Placement
from dora_dist.safetensors_io import TensorFolder


def load_base(model: nn.Module, folder: TensorFolder, placement: Placement, dtype: torch.dtype, seed: int) -> None:
    """Give every parameter of `model` (on the meta device) its place: base weights from `folder`, adapters by `seed`.

    Tied parameters stay tied. All names and shapes are checked before a byte is read; a missing tensor or another
    shape is a UserError, the same on every rank.
    """
    owners = _owners(model)
    sources = {id(p): _source_name(names, folder) for p, names in owners.values()}
    _check(owners, sources, folder)
    total = sum(p.numel() for p, _ in owners.values())
    with tqdm(total=total, unit="weight", unit_scale=True, desc="loading base", disable=not placement.first) as bar:
        for parameter, names in owners.values():
            source = sources[id(parameter)]
            fill = _read(folder, source) if source else _initial(model, names[0], parameter.shape, seed)
            placed = placement.place(parameter, dtype, fill)
            for name in names:
                module, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(module), attribute, placed)
            bar.update(parameter.numel())


def _initial(model: nn.Module, name: str, shape: torch.Size, seed: int) -> Fill:
    module, _, kind = name.rpartition(".")
    layer = model.get_submodule(module)
    assert isinstance(layer, DoraLinear)
    return initial_values(name, shape, seed, initial_bound(kind, shape, layer.spec.gated))


def initial_values(name: str, shape: torch.Size, seed: int, bound: float) -> Fill:
    """U(−bound, bound) by seed and name, the same at every world size; zeros if `bound` is 0."""
    if not bound:
        return _zeros
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def fill(start: int, stop: int, out: Tensor) -> None:
        whole = torch.rand(shape.numel(), generator=generator).mul_(2 * bound).sub_(bound)
        out.copy_(whole[start:stop])

    return fill


def _zeros(start: int, stop: int, out: Tensor) -> None:
    out.zero_()


def _owners(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[str]]]:
    """Each distinct parameter with all of its names."""
    owners: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), (parameter, []))[1].append(name)
    return owners


def _source_name(names: list[str], folder: TensorFolder) -> str | None:
    """The tensor that holds a base parameter: any of its names; None for an adapter's parameter."""
    if names[0].rpartition(".")[2] in ADAPTER_PARAMETERS:
        return None
    return next((name for name in names if name in folder.entries), names[0])


def _check(
    owners: dict[int, tuple[nn.Parameter, list[str]]], sources: dict[int, str | None], folder: TensorFolder
) -> None:
    for problem in _problems(owners, sources, folder):
        raise UserError(f"model.path: {problem}; is this folder the model that its config.json describes?")


def _problems(
    owners: dict[int, tuple[nn.Parameter, list[str]]], sources: dict[int, str | None], folder: TensorFolder
) -> Iterator[str]:
    for parameter, _ in owners.values():
        source = sources[id(parameter)]
        if source is None:
            continue
        if source not in folder.entries:
            yield f"{folder.path} has no tensor {source!r} (it has {len(folder.entries)} others)"
        elif tuple(folder.entries[source].shape) != tuple(parameter.shape):
            yield (
                f"tensor {source!r} in {folder.entries[source].path} has shape "
                f"{list(folder.entries[source].shape)}, the model needs {list(parameter.shape)}"
            )


def _read(folder: TensorFolder, name: str) -> Fill:
    def fill(start: int, stop: int, out: Tensor) -> None:
        folder.read_flat(name, start, stop, out=out)

    return fill


def adapted_layers(model: nn.Module) -> dict[str, DoraLinear]:
    """Every DoraLinear of a model by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DoraLinear)}
