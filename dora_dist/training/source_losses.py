"""The loss of each source of a mixture, added up on the device and read when a line is logged."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dora_dist.tasks.objectives.base import add_up

KEY = "sources"
"""Where a batch has the source of each row: (rows,) int64, -1 for a filler; of rows with several samples that of each
token: (rows, length) int64, -1 for padding."""


class WithSources:
    """A collator whose batches also say which source each row is of, or each token of a row of samples."""

    def __init__(self, collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        batch = self._collator(samples)
        if isinstance(samples[0], Mapping):
            return {**batch, KEY: torch.tensor([sample.get("source", -1) for sample in samples])}
        sources = torch.full_like(batch["input_ids"], -1)
        for i, row in enumerate(samples):
            of = [sample.get("source", -1) for sample in row for _ in sample["input_ids"]]
            sources[i, : len(of)] = torch.tensor(of)
        return {**batch, KEY: sources}


class SourceLosses:
    """Sums over learnt tokens of each source since they were last read."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._sums: Tensor | None = None  # (2, sources) fp64 on the device: losses, and how many tokens

    def add(self, rows: tuple[Tensor, Tensor] | None, sources: Tensor) -> None:
        """Losses summed over each row's tokens, and the number of these, or the same of each place; nothing waits.

        None: what is minimised does not say them. sources: int64, of the same shape as both, -1 for none.
        """
        if rows is None:
            return
        of = sources.flatten()[:, None] == torch.arange(len(self._names), device=sources.device)
        sums = torch.stack([each.detach().double().flatten() for each in rows]) @ of.double()
        self._sums = sums if self._sums is None else self._sums + sums

    def settle(self, device: torch.device) -> dict[str, float]:
        """Each source's loss per learnt token, and its learnt tokens, over all ranks since the last call (collective).

        {} where nothing says them; a source of which nothing came is left out.
        """
        nothing = torch.zeros(2, len(self._names), dtype=torch.float64, device=device)
        sums, self._sums = nothing if self._sums is None else self._sums, None
        add_up(sums)
        found: dict[str, float] = {}
        for name, loss, tokens in zip(self._names, *sums.tolist(), strict=True):
            if tokens:
                found |= {f"loss/{name}": loss / tokens, f"learnt/{name}": tokens}
        return found
