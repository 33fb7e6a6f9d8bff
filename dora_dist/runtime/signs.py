"""Signs of life: what each rank writes every second into the store that the ranks met in.

A sign says which process gives it, its own number, and how far the main thread has come: the number of collectives that
it has entered. That needs no code in what trains, evaluates or generates: all ranks enter the same collectives, and a
rank that hangs has entered fewer than those that wait for it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from dora_dist.runtime.distributed import World, training_groups


@dataclass(frozen=True)
class Sign:
    """One sign of life of one rank."""

    host: str
    pid: int
    number: int
    """Counts this rank's signs: two with the same number are the same sign."""
    collectives: int
    """How many the main thread has entered."""


@dataclass(frozen=True)
class Reason:
    """Why the ranks end: the first failure of any of them, who said so, and the exit status that goes with it."""

    rank: int
    code: int
    text: str


class SignsOfLife:
    """The ranks' signs and the reason to end, in one store. Methods raise RuntimeError when the store is gone."""

    _runs = 0  # in this process, the same on every rank; keeps the keys of one run in the store apart from the next's

    def __init__(self, world: World) -> None:
        self._world = world
        SignsOfLife._runs += 1
        # A connection of its own: a watch must not wait for what the main thread asks the store.
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"watch/{SignsOfLife._runs}", store.clone())
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        self.in_a_file = isinstance(store, dist.FileStore)
        """Whether the store outlives every rank; else it lives in rank 0, or in the launcher."""
        self._number = 0
        self._names = [f"sign/{rank}" for rank in range(world.world_size)]
        self._lock, self._question = threading.Lock(), 0
        self._open_question: int | None = None

    @property
    def open_question(self) -> int | None:
        """The number of the question that the store has not answered yet."""
        return self._open_question

    def give(self) -> None:
        self._number += 1
        sign = Sign(socket.gethostname(), os.getpid(), self._number, collectives_entered())
        with self._asking():
            self._store.set(self._names[self._world.rank], json.dumps(asdict(sign)))

    def read(self) -> dict[int, Sign]:
        """The last sign of each rank that has given one."""
        with self._asking():
            if self._store.check(self._names):  # a moment after the start: one question for all
                found = dict(enumerate(self._store.multi_get(self._names)))
            else:
                there = [rank for rank, name in enumerate(self._names) if self._store.check([name])]
                found = {rank: self._store.get(self._names[rank]) for rank in there}
        return {rank: Sign(**json.loads(sign)) for rank, sign in found.items()}

    def describe(self, ranks: list[int]) -> str:
        """Ranks with their hosts and processes, for people."""
        signs, shown = self.read(), ranks[:8]
        parts = [
            f"rank {rank} (host {signs[rank].host}, process {signs[rank].pid})" if rank in signs else f"rank {rank}"
            for rank in shown
        ]
        return ", ".join(parts) + (f" and {len(ranks) - len(shown)} more" if len(ranks) > len(shown) else "")

    def agree(self, code: int, text: str) -> Reason:
        """Give a reason to end; the first one counts, and is returned."""
        with self._asking():
            self._store.compare_set("reason", "", json.dumps(asdict(Reason(self._world.rank, code, text))))
        reason = self.reason()
        assert reason is not None
        return reason

    def reason(self) -> Reason | None:
        """The reason to end, if any rank has given one."""
        with self._asking():
            if not self._store.check(["reason"]):
                return None
            return Reason(**json.loads(self._store.get("reason").decode()))

    def say_ended(self) -> None:
        """This rank knows the reason, and asks nothing more."""
        with self._asking():
            self._store.set(f"ended/{self._world.rank}", "")

    def wait_for_the_others(self, timeout_s: float) -> None:
        """Until every rank has said that it ended, or the time is over: the store may live in this one."""
        ended = [f"ended/{rank}" for rank in range(self._world.world_size)]
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self._asking():
                if self._store.check(ended):
                    return
            time.sleep(0.1)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with self._lock:
            self._question += 1
            self._open_question = self._question
            try:
                yield
            finally:
                self._open_question = None


def collectives_entered() -> int:
    """By this rank's main thread, in all process groups that it uses; the same number on every rank at rest."""
    total = 0
    for group in training_groups():
        with suppress(RuntimeError):  # a group that is being destroyed
            total += group._get_sequence_number_for_group()
    return total
