"""No rank waits for ever for one that is gone, and every rank can say which it was.

A thread of every rank gives a sign of life each second, in the store that the ranks met in. A rank that fails leaves
its reason there, and the others, who may be waiting for it inside a collective, end with that reason. A rank whose
collective breaks calls the roll: whoever has stopped giving signs is lost.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dora_dist.distributed import World
from dora_dist.errors import LostRank, Stopped, UserError
from dora_dist.exit_codes import FAILED, INTERRUPTED, LOST_RANK, STOPPED, USERS_MISTAKE

INTERVAL_S = 1.0  # between signs of life
SILENCE_S = 5.0  # without one a rank is lost, if a collective broke; also the time that ranks have to end by themselves


@dataclass(frozen=True)
class Reason:
    """Why the ranks end: the first failure of any of them, who said so, and the exit status that goes with it."""

    rank: int
    code: int
    text: str


class Watch:
    """Watches over all ranks inside its context; on an error the context ends every rank.

    Leaving it well waits for the other ranks. Leaving it by an error raises that error, or LostRank if its cause is
    that another rank is gone. A rank that cannot end by itself, because it is stuck in a collective, is ended by its
    thread: the reason goes to stderr, `before_exit` runs, and the process ends with the reason's exit status.
    """

    _count = 0  # the same on every rank: what an earlier run left in the store is not ours

    def __init__(self, world: World) -> None:
        self._world = world
        self.before_exit: Callable[[], None] = lambda: None
        self._over = threading.Event()
        Watch._count += 1
        self._limit_s: float | None = None
        if world.world_size > 1:
            # A connection of its own: this thread must not wait for what the main thread asks the store.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore(f"watch/{Watch._count}", store.clone())
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def limit_silence(self, seconds: float) -> None:
        """From now on end every rank when one has given no sign of life for so long, even if no collective breaks."""
        self._limit_s = seconds

    def __enter__(self) -> "Watch":
        if self._world.world_size > 1:
            self._give_sign()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.world_size == 1:
            return
        if error is None:
            self._over.set()
            self._thread.join()
            dist.barrier()  # the store may live in a rank: none leaves before all have stopped asking it
            return
        try:
            reason = self._reason(error)
            self._over.set()
            self._wait_for_the_others()
        except RuntimeError as gone:
            raise LostRank(_no_store(gone)) from error
        says_it_itself = isinstance(error, UserError | Stopped | KeyboardInterrupt)
        if not says_it_itself and (reason.rank != self._world.rank or reason.code == LOST_RANK):
            raise LostRank(reason.text, reason.code) from error

    # --- the thread ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        while not self._over.wait(INTERVAL_S):
            try:
                self._give_sign()
                if self._world.first and self._limit_s is not None:
                    self._end_if_silent(seen, self._limit_s)
                if not self._store.check(["reason"]):
                    continue
                reason = self._agreed()
            except RuntimeError as error:
                reason = Reason(0, LOST_RANK, _no_store(error))
            if not self._over.wait(SILENCE_S):  # the main thread has not noticed by itself
                self._end(reason)

    def _end_if_silent(self, seen: dict[int, tuple[str, float]], limit_s: float) -> None:
        now = time.monotonic()
        for rank, sign in self._signs().items():
            if seen.get(rank, ("", 0.0))[0] != sign:
                seen[rank] = (sign, now)
            elif now - seen[rank][1] > limit_s:
                self._agree(LOST_RANK, f"lost {self._describe(rank)}: no sign of life for {limit_s:g} s")

    def _end(self, reason: Reason) -> None:
        sys.stderr.write(f"error on rank {self._world.rank}: {reason.text}\n")
        sys.stderr.flush()
        self.before_exit()
        try:
            self._store.set(f"ended/{self._world.rank}", "")
        except RuntimeError:
            sys.stderr.write(f"rank {self._world.rank}: the others could not be told\n")
        os._exit(reason.code)

    # --- the store -------------------------------------------------------------------------------------------------

    def _give_sign(self) -> None:
        sign = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.monotonic()}
        self._store.set(f"sign/{self._world.rank}", json.dumps(sign))

    def _signs(self) -> dict[int, str]:
        names = {rank: f"sign/{rank}" for rank in range(self._world.world_size)}
        there = {rank: name for rank, name in names.items() if self._store.check([name])}
        return {rank: self._store.get(name).decode() for rank, name in there.items()}

    def _describe(self, rank: int) -> str:
        sign = self._signs().get(rank)
        if sign is None:
            return f"rank {rank}"
        fields = json.loads(sign)
        return f"rank {rank} (host {fields['host']}, process {fields['pid']})"

    def _agree(self, code: int, text: str) -> Reason:
        """Give a reason; the first one counts, and is returned."""
        self._store.compare_set("reason", "", json.dumps(asdict(Reason(self._world.rank, code, text))))
        return self._agreed()

    def _agreed(self) -> Reason:
        return Reason(**json.loads(self._store.get("reason").decode()))

    # --- the end ---------------------------------------------------------------------------------------------------

    def _reason(self, error: BaseException) -> Reason:
        """Why all ranks end, seen from a rank that met an error: its own failure, or another rank's."""
        here = f"rank {self._world.rank} on {socket.gethostname()}"
        if isinstance(error, UserError):
            return self._agree(USERS_MISTAKE, str(error))
        if isinstance(error, Stopped):
            return self._agree(STOPPED, f"{here}: {error}")
        if isinstance(error, KeyboardInterrupt):
            return self._agree(INTERRUPTED, f"{here}: interrupted")
        before = self._signs()
        deadline = time.monotonic() + SILENCE_S
        while time.monotonic() < deadline and not self._store.check(["reason"]):
            time.sleep(INTERVAL_S / 5)
        if self._store.check(["reason"]):
            return self._agreed()
        after = self._signs()
        silent = [rank for rank in range(self._world.world_size) if before.get(rank) == after.get(rank)]
        if silent:
            lost = ", ".join(self._describe(rank) for rank in silent)
            return self._agree(LOST_RANK, f"lost {lost}: no sign of life for {SILENCE_S:g} s")
        return self._agree(FAILED, f"{here}: {traceback.format_exception_only(error)[-1].strip()}")

    def _wait_for_the_others(self) -> None:
        """The store may live in this rank, so it stays until the others know the reason, or will never ask."""
        ended = [f"ended/{rank}" for rank in range(self._world.world_size)]
        deadline = time.monotonic() + 2 * SILENCE_S + INTERVAL_S
        with nullcontext() if self._world.first else suppress(RuntimeError):  # rank 0 has seen us, and left
            self._store.set(ended[self._world.rank], "")
            while time.monotonic() < deadline and not self._store.check(ended):
                time.sleep(INTERVAL_S / 10)
        if self._world.first:
            time.sleep(INTERVAL_S / 2)  # the others' last question


def _no_store(error: BaseException) -> str:
    first_line = str(error).partition("\n")[0]
    return f"lost rank 0, or whatever holds the store that the ranks met in ({first_line})"
