"""Where a model's parameters and buffers live. Chosen once, when the model is built; nothing else asks."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

Fill = Callable[[int, int, Tensor], None]
"""fill(start, stop, out): write elements [start, stop) of a flattened weight into `out`, 1-D on the CPU."""

RecordFill = Callable[[int, int, Sequence[Tensor]], None]
"""fill(first, last, outs): write records [first, last) of a weight into 1-D tensors on the CPU, one for each of the
parameters that hold it."""


def in_place(fill: Fill) -> RecordFill:
    """For a weight that one parameter holds as it is: a record is one element."""
    return lambda first, last, outs: fill(first, last, outs[0])


class Placement(Protocol):
    """Turns parameters without memory (meta device) into real ones."""

    def place(self, parameters: Sequence[nn.Parameter], records: int, fill: RecordFill) -> list[nn.Parameter]:
        """Real parameters for those that hold one weight together; `fill` writes the records that are held here.

        Each of `parameters` (meta, of the final dtype) has the same number of elements for each of the `records`. One
        with several elements a record is 1-D, and comes back longer where that is what gives ranks equal shares.
        """
        ...

    def place_buffer(self, buffer: Tensor) -> Tensor:
        """A buffer with its values and its own dtype, whole, where the model computes; on shards too."""
        ...

    def assign(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Overwrite a placed parameter, before any optimizer exists, with whole `values` known on every rank."""
        ...

    def read(self, parameter: nn.Parameter) -> Tensor | None:
        """A trained parameter's whole values as its optimizer has them, fp32 on the CPU; on shards collective, and None
        on all processes but the first.
        """
        ...

    def anywhere(self, found: list[str]) -> list[str]:
        """What any process that holds a share of the model has `found`: the same list on each (collective)."""
        ...

    @property
    def first(self) -> bool:
        """Whether this process speaks for all (progress bars, summaries)."""
        ...


class WholePlacement:
    """Every parameter whole, on one device: a single process with no engine."""

    first = True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def place(self, parameters: Sequence[nn.Parameter], records: int, fill: RecordFill) -> list[nn.Parameter]:
        values = [torch.empty(p.numel(), dtype=p.dtype) for p in parameters]
        fill(0, records, values)
        return [
            nn.Parameter(v.view(p.shape).to(self.device), p.requires_grad)
            for v, p in zip(values, parameters, strict=True)
        ]

    def place_buffer(self, buffer: Tensor) -> Tensor:
        return buffer.to(self.device)

    def assign(self, parameter: nn.Parameter, values: Tensor) -> None:
        parameter.data.copy_(values)

    def read(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.detach().to("cpu", torch.float32, copy=True)

    def anywhere(self, found: list[str]) -> list[str]:
        return list(dict.fromkeys(found))
