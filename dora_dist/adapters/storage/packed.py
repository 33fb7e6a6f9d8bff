"""What storages of packed records have in common. One of them says how a record is encoded and decoded."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dora_dist.adapters.storage.base import StoredTensor
from dora_dist.weights.placement import Fill, RecordFill

CHUNK_ELEMENTS = 4 * 2**20
"""Elements of a weight that are fp32 at a time while they are encoded or decoded: 16 MiB."""


class PackedStorage(ABC):
    """A `WeightStorage` whose tensors are flat: records one after the other.

    A subclass sets `name`, `record` and `tensors`, and writes `encode` and `decode`. The products decode the whole
    weight of a layer to the dtype of what it is multiplied by; a subclass with a kernel of its own overrides them.
    """

    name: str
    record: int
    tensors: Mapping[str, StoredTensor]

    @abstractmethod
    def encode(self, values: Tensor) -> Sequence[Tensor]:
        """values (n, record) fp32 -> (n, elements) of each of `tensors`, in its dtype."""

    @abstractmethod
    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        """(n, elements) of each of `tensors` -> (n, record) fp32, on the tensors' device."""

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
        records = []
        for values, stored in zip(tensors, self.tensors.values(), strict=True):
            records.append(
                values[first * stored.elements : last * stored.elements].to(device).view(-1, stored.elements)
            )
        return self.decode(records).flatten()[start - first * self.record : stop - first * self.record]

    def project(
        self, x: Tensor, tensors: Sequence[Tensor], shape: tuple[int, int], *, bias: Tensor | None = None
    ) -> Tensor:
        return torch.ops.aten.linear(x, self._weight(tensors, shape, like=x), bias)

    def project_back(self, grad: Tensor, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        return grad @ self._weight(tensors, shape, like=grad)

    def _weight(self, tensors: Sequence[Tensor], shape: tuple[int, int], *, like: Tensor) -> Tensor:
        """The whole weight (out, in), with dtype and device of `like`."""
        numel = shape[0] * shape[1]
        weight = like.new_empty(numel)
        step = max(1, CHUNK_ELEMENTS // self.record) * self.record
        for start in range(0, numel, step):
            stop = min(start + step, numel)
            weight[start:stop] = self.to_fp32(tensors, start, stop, device=like.device)
        return weight.view(shape)
