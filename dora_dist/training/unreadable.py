"""Records that cannot be read when their turn comes, on any rank: they end the run, or are left out and counted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from dora_dist.data.bad_records import MOST, too_many, with_remedy
from dora_dist.data.stream import Problem
from dora_dist.runtime.console import warn
from dora_dist.runtime.distributed import World
from dora_dist.runtime.errors import UserError

_FIRST = 3  # of a stream's records that are named
_FEW = 10
"""Records that may always be left out of a stream: of the first few a share says little."""
KEY = "problems"
"""Where a batch has what is wrong with samples that could not be made."""


class WithProblems:
    """A collator whose batches also say what is wrong with samples that could not be made."""

    def __init__(self, collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        found = [sample["problem"] for sample in samples if "problem" in sample]
        return {**self._collator(samples), **({KEY: found} if found else {})}


class Unreadable:
    """Settles an objective's `problems`, a message or a `Problem` for each such record of this rank, with those of the
    other ranks; `what_to_do` are the values of data.bad_images and data.bad_records.
    """

    def __init__(self, problems: list[Any], what_to_do: Mapping[str, str], world: World) -> None:
        self.problems, self._what_to_do, self._world = problems, what_to_do, world
        self.left_out = self._bad = self._read = 0

    @property
    def any(self) -> bool:
        """Whether this rank has new problems."""
        return bool(self.problems)

    def read(self, records: int) -> None:
        """So many more records were read, on all ranks together."""
        self._read += records

    def settle(self) -> dict[str, float]:
        """What to log about new problems on any rank, nothing if there are none (collective).

        Raises UserError on every rank if there are any and they are to be errors, or if a stream has too many.
        """
        everyones: list[Any] = [None] * self._world.world_size
        dist.all_gather_object(everyones, self.problems)
        self.problems.clear()
        found = [problem for of_rank in everyones for problem in of_rank]
        if not found:
            return {}
        for problem in found:
            self._take(problem if isinstance(problem, Problem) else Problem(problem, "data.bad_images"))
        if self._bad > max(_FEW, MOST * self._read):
            raise UserError(too_many("data.train", self._bad, self._read, found[0].text))
        return {"records_skipped": float(self.left_out)}

    def _take(self, problem: Problem) -> None:
        self.left_out += 1
        if problem.field is None:
            raise UserError(problem.text)
        error = self._what_to_do.get(problem.field) == "error"
        if problem.field == "data.bad_images":
            if error:
                raise UserError(f'{problem.text}; fix it, or set data.bad_images to "skip" to leave such records out')
            warn(f"left out: {problem.text}")
            return
        if error:
            raise with_remedy(UserError(problem.text))
        self._bad += problem.field == "data.bad_records"
        if self.left_out <= _FIRST:
            warn(f"left out: {problem.text}" + ("; further ones are counted" if self.left_out == _FIRST else ""))
