"""Records that cannot be read when their turn comes, on any rank: they end the run, or are left out and counted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
_IN_A_ROW = 100
"""Records of whole steps in a row of which nothing may be learnt: each such step only wears momentum off."""
KEY = "problems"
"""Where a batch has what is wrong with samples that could not be made."""
COUNTS = "records_left_out"
"""Of a checkpoint's manifest (`Unreadable.counts`)."""


class WithProblems:
    """A collator whose batches also say what is wrong with samples that could not be made."""

    def __init__(self, collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        found = [sample["problem"] for sample in samples if "problem" in sample]
        return {**self._collator(samples), **({KEY: found} if found else {})}


@dataclass
class _Counts:
    """Records since the beginning of a run, on all ranks together."""

    read: int = 0
    left_out: int = 0
    bad: int = 0
    """Of these: of a stream, and they cannot be used."""
    without: int = 0
    """Of these: of a stream, and nothing can be learnt of them."""


class Unreadable:
    """Settles an objective's `problems`, a message or a `Problem` for each such record of this rank, with those of the
    other ranks; `what_to_do` are the values of data.bad_images and data.bad_records.
    """

    def __init__(self, problems: list[Any], what_to_do: Mapping[str, str], world: World) -> None:
        self.problems, self._what_to_do, self._world = problems, what_to_do, world
        self._counts = _Counts()
        self._named = self._in_step = self._in_a_row = 0
        self._learnt = True  # of the last step
        self._warned = False

    @property
    def any(self) -> bool:
        """Whether this rank has new problems."""
        return bool(self.problems)

    @property
    def counts(self) -> dict[str, int]:
        """For a checkpoint, so that a run that is resumed counts on where it was."""
        return asdict(self._counts)

    def go_on(self, manifest: Mapping[str, Any]) -> None:
        """Count on from a checkpoint's `counts`; those of earlier versions have none."""
        self._counts = _Counts(**manifest.get(COUNTS, {}))

    def read(self, records: int) -> None:
        """So many more records were read for a step, on all ranks together."""
        self._counts.read += records
        if self._learnt:
            self._in_a_row = 0
        self._in_step, self._learnt = records, True

    def settle(self) -> dict[str, float]:
        """What to log about new problems on any rank, nothing if there are none (collective).

        Raises UserError on every rank if there are any and they are to be errors, or if a stream has too many, or has
        nothing to learn for long.
        """
        everyones: list[Any] = [None] * self._world.world_size
        dist.all_gather_object(everyones, self.problems)
        self.problems.clear()
        found = [problem for of_rank in everyones for problem in of_rank]
        if not found:
            return {}
        for problem in found:
            self._take(problem if isinstance(problem, Problem) else Problem(problem, "data.bad_images"))
        counts = self._counts
        if counts.bad > max(_FEW, MOST * counts.read):
            raise UserError(too_many("data.train", counts.bad, counts.read, found[0].text))
        self._check_learnt([problem.text for problem in found if isinstance(problem, Problem)])
        return {"records_skipped": float(counts.left_out)}

    def _check_learnt(self, left_out: Sequence[str]) -> None:
        """left_out: what is said of the records of a stream that were left out of a step."""
        if not left_out:
            return
        if len(left_out) == self._in_step:
            self._learnt = False
            self._in_a_row += self._in_step
        if self._in_a_row >= _IN_A_ROW:
            raise UserError(
                f"data.train: of the last {self._in_a_row:,} records none could be learnt from; look at the data and "
                f"data.cutoff_len (the last: {left_out[-1]})"
            )
        without, read = self._counts.without, self._counts.read
        if not self._warned and without > max(_FEW, MOST * read):
            self._warned = True
            warn(
                f"data.train: {without:,} of {read:,} records have no token to learn from; raise "
                f"data.cutoff_len (the last left out: {left_out[-1]})"
            )

    def _take(self, problem: Problem) -> None:
        self._counts.left_out += 1
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
        self._counts.bad += problem.field == "data.bad_records"
        self._counts.without += problem.field == "data.cutoff_len"
        self._named += 1
        if self._named <= _FIRST:
            warn(f"left out: {problem.text}" + ("; further ones are counted" if self._named == _FIRST else ""))
