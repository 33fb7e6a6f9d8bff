"""No rank waits for ever for one that is gone or that hangs, and every rank can say which it was.

A thread of every rank writes a sign of life into the ranks' store each second. The main thread need not help: it may be
inside a collective, or wait for a device without end, because with NCCL a collective only queues work and raises
nothing in Python when another rank dies.

Rank 0's thread judges the signs. A rank without a fresh sign is lost. When no rank makes progress, those that have
entered the fewest collectives hang, and the others wait for them. A rank that fails writes its reason; a rank whose
collective breaks first looks at who still gives signs. Every rank's thread reads the reason, and ends the process if
the main thread does not.
"""

import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from types import TracebackType

import torch.distributed as dist

from dora_dist.runtime.console import STREAMS, complain
from dora_dist.runtime.distributed import World, broken_collective
from dora_dist.runtime.errors import LostRank, Stopped, UserError
from dora_dist.runtime.exit_codes import FAILED, INTERRUPTED, LOST_RANK, STOPPED, USERS_MISTAKE
from dora_dist.runtime.signs import Reason, Sign, SignsOfLife

INTERVAL_S = 1.0  # between signs of life
FAREWELL_S = 5.0  # for ranks to end by themselves; a rank silent for so long is lost if a collective broke, too
TELLING_S = 5.0  # for whoever gets the reason of an end, who may write files
SILENCE_S = 30.0
"""Without a sign for so long a rank is lost, once steps are taken. The thread does nothing else, so a sign is late only
where the process does not run, or other code holds Python's global interpreter lock, which a step does for moments."""
START_SILENCE_S = 120.0
"""The same before the first step: parsing JSON holds the lock, and data may be gigabytes of JSON, read at 100 MB/s."""


class Judge:
    """Who is lost and who hangs, from the ranks' signs, looked at every INTERVAL_S.

    Time is counted in looks: while this process itself did not run (stopped, swapped out), no rank becomes older.
    """

    def __init__(self, world_size: int) -> None:
        self._signs: dict[int, Sign] = {}
        self._silent = dict.fromkeys(range(world_size), 0)
        self._still = 0

    def look(self, signs: Mapping[int, Sign]) -> None:
        for rank in self._silent:
            before, now = (signs[rank].number if rank in signs else None for signs in (self._signs, signs))
            self._silent[rank] = self._silent[rank] + 1 if before == now else 0
        self._still = self._still + 1 if self._progress(self._signs) == self._progress(signs) else 0
        self._signs = dict(signs)

    def lost(self, seconds: float) -> list[int]:
        """Ranks without a fresh sign for so long."""
        return [rank for rank, looks in self._silent.items() if looks * INTERVAL_S >= seconds]

    def hanging(self, seconds: float) -> list[int]:
        """Ranks that the others wait for, when none has come further for so long; none if all are equally far."""
        entered = self._progress(self._signs)
        if self._still * INTERVAL_S < seconds or len(set(entered.values())) < 2:
            return []
        return [rank for rank, count in entered.items() if count == min(entered.values())]

    @staticmethod
    def _progress(signs: Mapping[int, Sign]) -> dict[int, int]:
        return {rank: sign.collectives for rank, sign in signs.items()}


class Watch:
    """Watches over all ranks inside its context; an error that leaves the context ends every rank.

    Without an error, leaving waits for the other ranks. Leaving by an error raises that error, or LostRank if its cause
    is that another rank is gone. A rank that cannot end by itself, because it is stuck in a collective or waits for a
    device, is ended by its thread: the reason goes to stderr, `before_exit` runs, and the process ends with the
    reason's exit status.
    """

    def __init__(
        self, world: World, start_timeout_s: float = 1800.0, *, told: Callable[[str], None] = lambda text: None
    ) -> None:
        """start_timeout_s: how long ranks may keep the others waiting while no steps are taken. told: gets the reason
        where a thread ends the process, after `before_exit`; it may take TELLING_S.
        """
        self._world, self._start_timeout_s, self._told = world, start_timeout_s, told
        self.before_exit: Callable[[], None] = lambda: None
        self.expect_no_steps()
        self._over, self._left = threading.Event(), threading.Event()
        self._judge, self._broken = Judge(world.world_size), 0
        self._holder = _UNKNOWN
        if world.world_size > 1:
            self._signs = SignsOfLife(world)
            self._threads = [
                threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True)
                for target in (self._watch, self._watch_the_store)
            ]

    def expect_steps(self, timeout_s: float) -> None:
        """From now on all ranks take steps together, and none may keep the others waiting for `timeout_s`."""
        self._limit_s = 0.9 * timeout_s  # before collectives time out, whose errors do not name the rank
        self._silence_s = min(SILENCE_S, self._limit_s)

    def expect_no_steps(self) -> None:
        """From now on ranks load, build or write, as before the first step."""
        self._limit_s = 0.9 * self._start_timeout_s
        self._silence_s = min(START_SILENCE_S, self._limit_s)

    def __enter__(self) -> "Watch":
        if self._world.world_size > 1:
            self._signs.give()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.world_size == 1:
            return
        if error is None:
            try:
                dist.barrier()  # a rank may still be lost until the last one is here
            except RuntimeError as broke:
                self._leave(broke)
                raise
            self._over.set()
            self._threads[0].join()
            self._say_ended(wait=self._world.first)
            self._left.set()
        else:
            self._leave(error)

    def _leave(self, error: BaseException) -> None:
        """Agree with the others on why all end. Raises LostRank if it is not this rank's own error."""
        try:
            reason = self._reason(error)
            self._over.set()
            self._say_ended(wait=True)
        except RuntimeError as gone:
            raise LostRank(self._no_store(gone)) from error
        finally:
            self._left.set()
        says_it_itself = isinstance(error, UserError | Stopped | KeyboardInterrupt)
        if not says_it_itself and (reason.rank != self._world.rank or reason.code == LOST_RANK):
            raise LostRank(reason.text, reason.code) from error

    # --- the threads -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        # Soon at first: a rank 0 that is lost within the first second is to be named, too.
        while not self._over.wait(INTERVAL_S / 5 if self._holder == _UNKNOWN else INTERVAL_S):
            try:
                self._signs.give()
                self._look()
                reason = self._signs.reason()
            except RuntimeError as error:
                reason = Reason(0, LOST_RANK, self._no_store(error))
            if reason is not None and not self._over.wait(FAREWELL_S):  # the main thread does not end by itself
                self._end(reason)

    def _look(self) -> None:
        """Rank 0 looks at everyone's signs; so does a rank whose collective broke without an exception."""
        broken = broken_collective()
        if self._holder == _UNKNOWN:
            self._holder = self._signs.describe([0])
        if not self._world.first and broken is None:
            return
        self._judge.look(self._signs.read())
        self._broken += broken is not None
        called = self._broken * INTERVAL_S > FAREWELL_S
        silence_s, limit_s = (FAREWELL_S, FAREWELL_S) if called else (self._silence_s, self._limit_s)
        if lost := self._judge.lost(silence_s):
            self._say_lost(lost, silence_s)
        elif hanging := self._judge.hanging(limit_s):
            text = f"alive, but for {limit_s:g} s the others have waited for it in a collective that it does not enter"
            self._signs.agree(LOST_RANK, f"lost {self._signs.describe(hanging)}: {text}")
        elif called:
            text = (
                f"a collective failed on rank {self._world.rank} ({broken}), though all ranks are alive and entered it"
            )
            self._signs.agree(LOST_RANK, f"{text}; look at the network between the nodes")

    def _watch_the_store(self) -> None:
        """End this rank if the store stops answering: its process or host is gone, though no connection has broken."""
        question, looks = None, 0
        while not self._left.wait(INTERVAL_S):
            if self._signs.open_question != question or question is None:
                question, looks = self._signs.open_question, 0
                continue
            looks += 1
            if looks * INTERVAL_S >= self._silence_s:
                silence = TimeoutError(f"no answer for {self._silence_s:g} s")
                self._end(Reason(0, LOST_RANK, self._no_store(silence)), can_tell=False)

    def _end(self, reason: Reason, can_tell: bool = True) -> None:
        complain(f"error on rank {self._world.rank}: {reason.text}")
        self.before_exit()  # first: a launcher may not wait for long
        telling = threading.Thread(target=self._told, args=(reason.text,), name="telling", daemon=True)
        telling.start()
        telling.join(TELLING_S)  # a file server that hangs, too, may not keep this process
        if can_tell:
            with suppress(RuntimeError):  # then the others find the store gone, too
                self._signs.say_ended()
        os._exit(reason.code)

    # --- the end ---------------------------------------------------------------------------------------------------

    def _reason(self, error: BaseException) -> Reason:
        """Why all ranks end, seen from a rank that met an error: its own failure, or another rank's."""
        here = f"rank {self._world.rank} on {socket.gethostname()}"
        if isinstance(error, UserError):
            return self._signs.agree(USERS_MISTAKE, str(error))
        if isinstance(error, Stopped):
            return self._signs.agree(STOPPED, f"{here}: {error}")
        if isinstance(error, KeyboardInterrupt):
            return self._signs.agree(INTERRUPTED, f"{here}: interrupted")
        before = self._signs.read()
        deadline = time.monotonic() + FAREWELL_S
        while time.monotonic() < deadline:
            if reason := self._signs.reason():
                return reason
            time.sleep(INTERVAL_S / 5)
        after = self._signs.read()
        if lost := [rank for rank in range(self._world.world_size) if before.get(rank) == after.get(rank)]:
            return self._say_lost(lost, FAREWELL_S)
        return self._signs.agree(FAILED, f"{here}: {traceback.format_exception_only(error)[-1].strip()}")

    def _say_lost(self, ranks: list[int], seconds: float) -> Reason:
        lost = f"lost {self._signs.describe(ranks)}: no sign of life for {seconds:g} s{_last_words()}"
        return self._signs.agree(LOST_RANK, lost)

    def _say_ended(self, wait: bool) -> None:
        """Tell the others that this rank asks nothing more. The store may live in rank 0, which leaves last."""
        with nullcontext() if self._world.first else suppress(RuntimeError):  # rank 0 has seen us, and left
            self._signs.say_ended()
            if wait:
                self._signs.wait_for_the_others(2 * FAREWELL_S + INTERVAL_S)
        if self._world.first and not self._signs.in_a_file:
            time.sleep(INTERVAL_S / 2)  # the others' last question

    def _no_store(self, error: BaseException) -> str:
        first_line = str(error).partition("\n")[0]
        return f"lost {self._holder}, or whatever holds the store that the ranks met in ({first_line}){_last_words()}"


_UNKNOWN = "rank 0"
"""Who holds the store, until its host and process are known."""


def _last_words() -> str:
    return f"; {STREAMS.log} may have what was printed last" if STREAMS.log else ""
