"""Loading a base model: each process reads its own elements from safetensors, straight into where they will live.

A flat row-major shard is one contiguous byte range of its tensor in the file, so a rank of N reads 1/N of every
tensor's bytes, no rank holds a whole tensor, and no weight is broadcast.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dora_dist.runtime.console import progress
from dora_dist.runtime.errors import UserError
from dora_dist.weights.names import locate
from dora_dist.weights.placement import Fill, Placement
from dora_dist.weights.safetensors_io import TensorFolder


def load_base(
    model: nn.Module,
    folder: TensorFolder,
    stored: Mapping[str, str],
    placement: Placement,
    dtype: torch.dtype,
    seed: int,
    initial: Mapping[str, Fill],
) -> list[str]:
    """Give every parameter of `model` (on the meta device) its place: base weights from `folder`.

    `stored` (`stored_names`) says what the folder calls a parameter; those in `initial` are
    not the base's and start with its values.
    Tied parameters stay tied. A parameter that is trained in full and not in the folder (a new task head), or a head's
    that has another shape there (other labels), is initialised by `seed`; the names of these are returned. All names
    and shapes are checked before a byte is read; another missing tensor or another shape is a UserError, the same on
    every rank, and so is a tensor with NaN or infinity in it. Persistent buffers are read where the folder has them;
    all buffers get their place, in their own dtype.
    """
    owners = _owners(model)
    prefix = getattr(model, "base_model_prefix", "")
    sources = {
        id(p): None if names[0] in initial else _source_name(p, names, stored, prefix, folder)
        for p, names in owners.values()
    }
    buffers = _stored_buffers(model, stored, prefix)
    _check([(source, p) for p, _ in owners.values() if (source := sources[id(p)])] + buffers, folder)
    for source, buffer in buffers:
        buffer.copy_(folder.read(source, dtype=buffer.dtype))
    _place_buffers(model, placement)
    std = getattr(getattr(model, "config", None), "initializer_range", None) or 0.02
    fresh: list[str] = []
    not_finite: list[str] = []
    total = sum(p.numel() for p, _ in owners.values())
    with progress(total, "loading the base", "weight", unit_scale=True, leave=False, shown=placement.first) as bar:
        for parameter, names in owners.values():
            source = sources[id(parameter)]
            if source is not None:
                fill = _read(folder, source, not_finite)
            elif names[0] in initial:
                fill = initial[names[0]]
            else:
                fill = fresh_values(names[0], parameter.shape, seed, std)
                fresh.append(names[0])
            placed = placement.place(parameter, dtype, fill)
            for name in names:
                module, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(module), attribute, placed)
            bar.update(parameter.numel())
    if damaged := placement.anywhere(not_finite):
        raise UserError(
            f"{folder.entries[damaged[0]].path}: tensor {damaged[0]!r} holds NaN or infinity (such tensors: "
            f"{len(damaged)}); download or copy the file again, or save the model again"
        )
    return fresh


def initial_values(name: str, shape: torch.Size, seed: int, bound: float, *, value: float = 0.0) -> Fill:
    """U(−bound, bound) by seed and name, the same at every world size; `value` everywhere if `bound` is 0."""
    if not bound:
        return _constant(value)
    generator = _generator(name, seed)

    def fill(start: int, stop: int, out: Tensor) -> None:
        whole = torch.rand(shape.numel(), generator=generator).mul_(2 * bound).sub_(bound)
        out.copy_(whole[start:stop])

    return fill


def fresh_values(name: str, shape: torch.Size, seed: int, std: float) -> Fill:
    """A new head's initial values, the same at every world size: N(0, std²); norms' weights 1, biases 0.

    That is what transformers does, save that the numbers follow from (seed, name).
    """
    if len(shape) < 2:
        return _constant(1.0 if name.endswith("weight") else 0.0)
    generator = _generator(name, seed)

    def fill(start: int, stop: int, out: Tensor) -> None:
        out.copy_(torch.randn(shape.numel(), generator=generator)[start:stop].mul_(std))

    return fill


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _constant(value: float) -> Fill:
    def fill(start: int, stop: int, out: Tensor) -> None:
        out.fill_(value)

    return fill


def _owners(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[str]]]:
    """Each distinct parameter with all of its names."""
    owners: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), (parameter, []))[1].append(name)
    return owners


def _source_name(
    parameter: nn.Parameter, names: list[str], stored: Mapping[str, str], prefix: str, folder: TensorFolder
) -> str | None:
    """The tensor that holds a base parameter, under any of its names; None for one that is initialised instead."""
    found = next(filter(None, (locate(name, stored, prefix) for name in names)), None)
    if not parameter.requires_grad:
        return found or names[0]
    in_head = bool(prefix) and not names[0].startswith(f"{prefix}.")
    resized = found is not None and tuple(folder.entries[found].shape) != tuple(parameter.shape)
    return None if in_head and resized else found


def _stored_buffers(model: nn.Module, stored: Mapping[str, str], prefix: str) -> list[tuple[str, Tensor]]:
    """The buffers that the folder has a tensor for, such as BART's bias of the logits, each with that tensor's name."""
    kept = model.state_dict().keys()
    found = [(locate(name, stored, prefix), buffer) for name, buffer in model.named_buffers() if name in kept]
    return [(source, buffer) for source, buffer in found if source is not None]


def _place_buffers(model: nn.Module, placement: Placement) -> None:
    """Position ids, rotary frequencies and the like: those that the folder does not have as well."""
    placed: dict[int, Tensor] = {}  # one tensor under several names stays one
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, placed.setdefault(id(buffer), placement.place_buffer(buffer)))


def _check(wanted: Iterable[tuple[str, Tensor]], folder: TensorFolder) -> None:
    for problem in _problems(wanted, folder):
        raise UserError(f"{problem}; is this folder the model that its config.json describes?")


def _problems(wanted: Iterable[tuple[str, Tensor]], folder: TensorFolder) -> Iterator[str]:
    for source, tensor in wanted:
        if source not in folder.entries:
            yield f"{folder.path}: has no tensor {source!r} (it has {len(folder.entries)} others)"
        elif tuple(folder.entries[source].shape) != tuple(tensor.shape):
            yield (
                f"tensor {source!r} in {folder.entries[source].path} has shape "
                f"{list(folder.entries[source].shape)}, the model needs {list(tensor.shape)}{_vocabulary(source)}"
            )


def _vocabulary(tensor: str) -> str:
    return (
        " (vocab_size in config.json)"
        if any(part in tensor for part in ("embed_tokens", "word_embeddings", "lm_head"))
        else ""
    )


def _read(folder: TensorFolder, name: str, not_finite: list[str]) -> Fill:
    """Reads a tensor's elements; adds its name to `not_finite` if there is NaN or infinity among them."""

    def fill(start: int, stop: int, out: Tensor) -> None:
        folder.read_flat(name, start, stop, out=out)
        if not is_finite(out):
            not_finite.append(name)

    return fill


def is_finite(values: Tensor) -> bool:
    """Whether all elements are; the sum tells, without memory for the answers, unless it overflows by itself."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
