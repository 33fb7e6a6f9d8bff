"""What storages of packed records have in common. One of them says how a record is encoded and decoded."""

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.adapters.storage.base import StoredTensor, WeightStorage
from dora_dist.runtime.errors import UserError
from dora_dist.weights.placement import Fill, RecordFill

CHUNK_ELEMENTS = 4 * 2**20
"""Elements of a weight that are fp32 at a time while they are encoded or decoded: 16 MiB."""
PRODUCT_ELEMENTS = {"cpu": 2 * 2**20}
OTHER_PRODUCT_ELEMENTS = 32 * 2**20
"""Elements of a weight that are decoded at a time while they are multiplied, by the kind of device: on a CPU they
should stay in its cache, elsewhere a product should be large.
"""
SUM_ELEMENTS = {"cpu": 16 * 2**20}
OTHER_SUM_ELEMENTS = 256 * 2**20
"""The same, where products of blocks are added up: what is in one block needs no sum in fp32 besides the result, and is
rounded as with a plain weight. Sums cost more than a CPU's cache spares.
"""
SCALE_BYTES = 2
"""Of a block's scale in the package's storages, a bfloat16."""
BLOCK_SIZES = (64, 128, 256, 512)


class PackedStorage(ABC):
    """A `WeightStorage` whose tensors are flat: records one after the other.

    A subclass sets `name`, `record` and `tensors`, and writes `encode`, and `decode` or `decode_into`. The products
    decode blocks of rows, one after the other into the same memory, in the dtype of what they are multiplied by; a
    subclass with a kernel of its own overrides them.
    """

    name: str
    record: int
    tensors: Mapping[str, StoredTensor]

    def settings(self) -> dict[str, Any]:
        return {}

    def with_settings(self, settings: Mapping[str, Any]) -> WeightStorage:
        check_settings(self, settings)
        return self

    @abstractmethod
    def encode(self, values: Tensor) -> Sequence[Tensor]:
        """values (n, record) fp32 -> (n, elements) of each of `tensors`, in its dtype."""

    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        """(n, elements) of each of `tensors` -> (n, record) fp32, on the tensors' device."""
        values = torch.empty(len(tensors[0]), self.record, device=tensors[0].device)
        self.decode_into(tensors, values)
        return values

    def decode_into(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Write (n, elements) of each of `tensors` as numbers to `out` (n, record), in its dtype.

        As `decode`, whose numbers are rounded to that dtype once.
        """
        out.copy_(self.decode(tensors))

    def hold(self, weight: nn.Parameter) -> dict[str, nn.Parameter]:
        records, device = -(-weight.numel() // self.record), weight.device
        held = {
            name: torch.empty(records * stored.elements, dtype=stored.dtype or weight.dtype, device=device)
            for name, stored in self.tensors.items()
        }
        if not weight.is_meta:
            flat = weight.detach().flatten()

            def read(start: int, stop: int, out: Tensor) -> None:
                out.copy_(flat[start:stop])

            self.encode_from(read, flat.numel())(0, records, list(held.values()))
        return {name: nn.Parameter(values, requires_grad=False) for name, values in held.items()}

    def encode_from(self, read: Fill, numel: int) -> RecordFill:
        def fill(first: int, last: int, outs: Sequence[Tensor]) -> None:
            step = max(1, CHUNK_ELEMENTS // self.record)
            for begin in range(first, last, step):
                end = min(begin + step, last)
                values = torch.zeros((end - begin) * self.record)
                start, stop = begin * self.record, min(end * self.record, numel)
                read(start, stop, values[: stop - start])
                for out, encoded in zip(outs, self.encode(values.view(-1, self.record)), strict=True):
                    elements = encoded.shape[1]
                    out[(begin - first) * elements : (end - first) * elements] = encoded.flatten()

        return fill

    def round_trip(self, values: Tensor) -> Tensor:
        padded = torch.zeros(-(-values.numel() // self.record) * self.record, device=values.device)
        padded[: values.numel()] = values
        return self.decode(self.encode(padded.view(-1, self.record))).flatten()[: values.numel()]

    def to_fp32(self, tensors: Sequence[Tensor], start: int, stop: int, *, device: torch.device) -> Tensor:
        first, last = start // self.record, -(-stop // self.record)
        records = self._records(tensors, first, last, device=device)
        return self.decode(records).flatten()[start - first * self.record : stop - first * self.record]

    def project(
        self, x: Tensor, tensors: Sequence[Tensor], shape: tuple[int, int], *, bias: Tensor | None = None
    ) -> Tensor:
        y = x.new_empty(len(x), shape[0])
        at_once = PRODUCT_ELEMENTS.get(x.device.type, OTHER_PRODUCT_ELEMENTS)
        for start, stop, weight in self._row_blocks(tensors, shape, like=x, at_once=at_once):
            y[:, start:stop] = torch.ops.aten.linear(x, weight, None if bias is None else bias[start:stop])
        return y

    def project_back(self, grad: Tensor, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        total: Tensor | None = None
        at_once = SUM_ELEMENTS.get(grad.device.type, OTHER_SUM_ELEMENTS)
        for start, stop, weight in self._row_blocks(tensors, shape, like=grad, at_once=at_once):
            part = grad[:, start:stop] @ weight
            if stop - start == shape[0]:
                return part
            # In fp32: each block's product is rounded as the whole one would be, and their sum a second time only.
            total = part.float() if total is None else total.add_(part)
        assert total is not None  # a weight has rows
        return total.to(grad.dtype)

    def _row_blocks(
        self, tensors: Sequence[Tensor], shape: tuple[int, int], *, like: Tensor, at_once: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Rows [start, stop) of the weight (out, in), with dtype and device of `like`; each overwrites the last.

        at_once: elements of a block, about.
        """
        rows, width = shape
        step = min(max(1, at_once // width), rows)
        # Rows need not begin where records do.
        memory = _scratch(like, (-(-step * width // self.record) + 1) * self.record).view(-1, self.record)
        # Decoding may need memory of its own.
        pieces = max(1, PRODUCT_ELEMENTS.get(like.device.type, OTHER_PRODUCT_ELEMENTS) // self.record)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            first, last = start * width // self.record, -(-stop * width // self.record)
            for begin in range(first, last, pieces):
                end = min(begin + pieces, last)
                records = self._records(tensors, begin, end, device=like.device)
                self.decode_into(records, memory[begin - first : end - first])
            offset = start * width - first * self.record
            yield start, stop, memory.view(-1)[offset : offset + (stop - start) * width].view(-1, width)

    def _records(self, tensors: Sequence[Tensor], first: int, last: int, *, device: torch.device) -> list[Tensor]:
        """Records [first, last), (last − first, elements) of each of `tensors`."""
        return [
            values[first * stored.elements : last * stored.elements].to(device).view(-1, stored.elements)
            for values, stored in zip(tensors, self.tensors.values(), strict=True)
        ]


class _Scratch(threading.local):
    """Of a thread, as backward runs in threads of its own."""

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}


_scratch_here = _Scratch()


def _scratch(like: Tensor, numel: int) -> Tensor:
    """(numel,) with dtype and device of `like`, uninitialised, until the thread's next call.

    A CPU's allocator gives so much memory back to the system, and every new page of it costs more than decoding its
    numbers: it is kept. Other devices' allocators keep it themselves.
    """
    if like.device.type != "cpu":
        return like.new_empty(numel)
    kept = _scratch_here.memory.get(like.dtype)
    if kept is None or len(kept) < numel:
        with torch.inference_mode(False):  # or nothing outside of such a mode could write to it
            kept = _scratch_here.memory[like.dtype] = like.new_empty(numel)
    return kept[:numel]


def check_settings(storage: WeightStorage, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` (model.storage_settings) if they are a storage's own and can be had. Raises UserError."""
    known = storage.settings()
    for name, value in settings.items():
        if name not in known:
            raise UserError(
                f"model.storage_settings: {json.dumps(name)} is not a setting of the storage {storage.name!r}; it has: "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        if type(value) is not type(known[name]):
            kind = "true or false" if isinstance(known[name], bool) else "a whole number"
            raise UserError(f"model.storage_settings: {name} = {json.dumps(value)}: must be {kind}")
    if settings.get("block_size", BLOCK_SIZES[0]) not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise UserError(f"model.storage_settings: block_size = {settings['block_size']}: must be one of {sizes}")
    return dict(settings)
