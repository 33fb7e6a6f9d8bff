"""Loading a base model: each process reads its own elements from safetensors, straight into where they will live.

A flat row-major shard is one contiguous byte range of its tensor in the file, so a rank of N reads 1/N of every
tensor's bytes, no rank holds a whole tensor, and no weight is broadcast.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dora_dist.runtime.console import progress
from dora_dist.runtime.errors import UserError
from dora_dist.weights.names import locate
from dora_dist.weights.placement import Fill, Placement, RecordFill, in_place
from dora_dist.weights.safetensors_io import TensorFolder


@dataclass(frozen=True)
class Source:
    """A base model's folder, and what it calls a parameter: `stored` (`stored_names`), and the `prefix` of the model's
    own part ("bert"), by which models with a head and plain encoders differ.
    """

    folder: TensorFolder
    stored: Mapping[str, str]
    prefix: str

    def locate(self, name: str) -> str | None:
        """The tensor that parameter `name` is read from, None if the folder does not have it."""
        return locate(name, self.stored, self.prefix)

    def in_head(self, name: str) -> bool:
        """Whether a parameter is of a head on the model's own part."""
        return bool(self.prefix) and not name.startswith(f"{self.prefix}.")


@dataclass(frozen=True)
class HeldWeight:
    """A frozen weight that a storage holds: `parameters` by name, each with its dtype (None: the model's).

    They have equally many elements for each of the `records`; `encode_from(read, numel)` makes what writes these.
    """

    shape: torch.Size
    parameters: Mapping[str, torch.dtype | None]
    records: int
    encode_from: Callable[[Fill, int], RecordFill]


@dataclass
class _Weight:
    """A weight to place: its names, the parameters (meta, with all of their names) that hold it, and its tensor in the
    folder, None if it does not come from there.
    """

    names: list[str]
    shape: torch.Size
    records: int
    encode_from: Callable[[Fill, int], RecordFill]
    parameters: list[tuple[nn.Parameter, list[str]]] = field(default_factory=list)
    tensor: str | None = None


def load_base(
    model: nn.Module,
    source: Source,
    placement: Placement,
    *,
    dtype: torch.dtype,
    held: Mapping[str, HeldWeight],
    initial: Mapping[str, Fill],
    fresh: Callable[[str, torch.Size], Fill],
    new_in: Sequence[str],
) -> list[str]:
    """Give every parameter of `model` (on the meta device) its place: base weights from `source`.

    `held` are the weights, by name, that a storage holds. Parameters in `initial` are not the base's and start with
    its values. Tied parameters stay tied. A parameter of the modules `new_in` (names) that is not in the folder (a new
    task head), or a head's that has another shape there (other labels), starts with `fresh(name, shape)`; the names of
    these are returned. All names and shapes are checked before a byte is read; another missing tensor or another shape
    is a UserError, the same on every rank, and so is a tensor with NaN or infinity in it. Persistent buffers are read
    where the folder has them; all buffers get their place, in their own dtype.
    """
    folder, weights = source.folder, _weights(model, held, dtype)
    for weight in weights:
        weight.tensor = None if weight.names[0] in initial else _source_tensor(weight, source, new_in)
    buffers = _stored_buffers(model, source)
    _check([(w.tensor, w.shape) for w in weights if w.tensor] + [(name, b.shape) for name, b in buffers], folder)
    for tensor, buffer in buffers:
        buffer.copy_(folder.read(tensor, dtype=buffer.dtype))
    _place_buffers(model, placement)
    made: list[str] = []
    not_finite: list[str] = []
    total = sum(weight.shape.numel() for weight in weights)
    with progress(total, "loading the base", "weight", unit_scale=True, leave=False, shown=placement.first) as bar:
        for weight in weights:
            name, numel = weight.names[0], weight.shape.numel()
            if weight.tensor is not None:
                read = _read(folder, weight.tensor, not_finite)
            elif name in initial:
                read = initial[name]
            else:
                read = fresh(name, weight.shape)
                made.append(name)
            placed = placement.place([p for p, _ in weight.parameters], weight.records, weight.encode_from(read, numel))
            for parameter, (_, names) in zip(placed, weight.parameters, strict=True):
                for name in names:
                    module, _, attribute = name.rpartition(".")
                    setattr(model.get_submodule(module), attribute, parameter)
            bar.update(numel)
    if damaged := placement.anywhere(not_finite):
        raise UserError(
            f"{folder.entries[damaged[0]].path}: tensor {damaged[0]!r} holds NaN or infinity (such tensors: "
            f"{len(damaged)}); download or copy the file again, or save the model again"
        )
    return made


def initial_values(name: str, shape: torch.Size, seed: int, bound: float, *, value: float = 0.0) -> Fill:
    """U(−bound, bound) by seed and name, the same at every world size; `value` everywhere if `bound` is 0."""
    if not bound:
        return _constant(value)
    generator = _generator(name, seed)

    def fill(start: int, stop: int, out: Tensor) -> None:
        whole = torch.rand(shape.numel(), generator=generator).mul_(2 * bound).sub_(bound)
        out.copy_(whole[start:stop])

    return fill


def fresh_values(name: str, shape: torch.Size, *, seed: int, std: float) -> Fill:
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


def _weights(model: nn.Module, held: Mapping[str, HeldWeight], dtype: torch.dtype) -> list[_Weight]:
    """Everything to place, in the model's order: a weight that a storage holds, or a parameter by all of its names."""
    owners: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), (parameter, []))[1].append(name)
    whose = {parameter: name for name, weight in held.items() for parameter in weight.parameters}
    weights: dict[str, _Weight] = {}
    for parameter, names in owners.values():
        kind: torch.dtype | None = None
        if (owner := whose.get(names[0])) is not None:
            of, kind = held[owner], held[owner].parameters[names[0]]
            weight = weights.setdefault(owner, _Weight([owner], of.shape, of.records, of.encode_from))
        else:
            shape = parameter.shape
            weight = weights[names[0]] = _Weight(names, shape, shape.numel(), lambda read, numel: in_place(read))
        typed = nn.Parameter(parameter.detach().to(kind or dtype), parameter.requires_grad)
        weight.parameters.append((typed, names))
    return list(weights.values())


def _source_tensor(weight: _Weight, source: Source, new_in: Sequence[str]) -> str | None:
    """The tensor that holds a base weight, under any of its names; None for one that is initialised instead."""
    found = next(filter(None, map(source.locate, weight.names)), None)
    if not any(name.startswith(f"{module}.") for name in weight.names for module in new_in):
        return found or weight.names[0]
    resized = found is not None and source.folder.entries[found].shape != tuple(weight.shape)
    return None if resized and source.in_head(weight.names[0]) else found


def _stored_buffers(model: nn.Module, source: Source) -> list[tuple[str, Tensor]]:
    """The buffers that the folder has a tensor for, such as BART's bias of the logits, each with that tensor's name."""
    kept = model.state_dict().keys()
    found = [(source.locate(name), buffer) for name, buffer in model.named_buffers() if name in kept]
    return [(tensor, buffer) for tensor, buffer in found if tensor is not None]


def _place_buffers(model: nn.Module, placement: Placement) -> None:
    """Position ids, rotary frequencies and the like: those that the folder does not have as well."""
    placed: dict[int, Tensor] = {}  # one tensor under several names stays one
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, placed.setdefault(id(buffer), placement.place_buffer(buffer)))


def _check(wanted: Iterable[tuple[str, torch.Size]], folder: TensorFolder) -> None:
    doubt = "is this folder the model that its config.json describes?"
    for tensor, shape in wanted:
        entry = folder.entries.get(tensor)
        if entry is None:
            raise UserError(f"{folder.path}: has no tensor {tensor!r} (it has {len(folder.entries)} others); {doubt}")
        if entry.shape != tuple(shape):
            needs = f"has shape {list(entry.shape)}, the model needs {list(shape)}{_vocabulary(tensor)}"
            raise UserError(f"tensor {tensor!r} in {entry.path} {needs}; {doubt}")


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
