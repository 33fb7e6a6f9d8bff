"""Records that cannot be read when their turn comes, on any rank: they end the run, or are left out and counted."""

from typing import Any

import torch.distributed as dist

from dora_dist.runtime.console import warn
from dora_dist.runtime.distributed import World
from dora_dist.runtime.errors import UserError


class Unreadable:
    """Settles an objective's `problems`, a message for each such record of this rank, with those of the other ranks;
    `what_to_do` is data.bad_images.
    """

    def __init__(self, problems: list[str], what_to_do: str, world: World) -> None:
        self.problems, self._what_to_do, self._world = problems, what_to_do, world
        self.left_out = 0

    @property
    def any(self) -> bool:
        """Whether this rank has new problems."""
        return bool(self.problems)

    def settle(self) -> dict[str, float]:
        """What to log about new problems on any rank, nothing if there are none (collective).

        Raises UserError on every rank if there are any and they are to be errors.
        """
        everyones: list[Any] = [None] * self._world.world_size
        dist.all_gather_object(everyones, self.problems)
        self.problems.clear()
        found = [problem for of_rank in everyones for problem in of_rank]
        if not found:
            return {}
        if self._what_to_do == "error":
            raise UserError(f'{found[0]}; fix it, or set data.bad_images to "skip" to leave such records out')
        for problem in found:
            warn(f"left out: {problem}")
        self.left_out += len(found)
        return {"records_skipped": float(self.left_out)}
