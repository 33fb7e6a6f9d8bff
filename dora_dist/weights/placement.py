"""Where a model's parameters and buffers live. Chosen once, when the model is built; nothing else asks."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

Fill = Callable[[int, int, Tensor], None]
"""fill(start, stop, out): write elements [start, stop) of a flattened parameter into `out`, 1-D on the CPU."""


class Placement(Protocol):
    """Turns parameters without memory (meta device) into real ones."""

    def place(self, parameter: nn.Parameter, dtype: torch.dtype, fill: Fill) -> nn.Parameter:
        """A real parameter of the meta parameter's shape: the elements held here are written by `fill`."""
        ...

    def place_buffer(self, buffer: Tensor) -> Tensor:
        """A buffer with its values and its own dtype, whole, where the model computes; on shards too."""
        ...

    def assign(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Overwrite a placed parameter, before any optimizer exists, with whole `values` known on every rank."""
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

    def place(self, parameter: nn.Parameter, dtype: torch.dtype, fill: Fill) -> nn.Parameter:
        values = torch.empty(parameter.numel(), dtype=dtype)
        fill(0, parameter.numel(), values)
        return nn.Parameter(values.view(parameter.shape).to(self.device), parameter.requires_grad)

    def place_buffer(self, buffer: Tensor) -> Tensor:
        return buffer.to(self.device)

    def assign(self, parameter: nn.Parameter, values: Tensor) -> None:
        parameter.data.copy_(values)

    def anywhere(self, found: list[str]) -> list[str]:
        return found
