"""Where ranks find one another before any process group exists, and notice who is missing."""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist

from dora_dist.runtime.errors import UserError
from dora_dist.runtime.launchers import PORT_OPTIONS, Launch, source_address

_FAREWELL_S = 10.0  # how long rank 0 keeps the store open for the others to hear who is missing


@dataclass(frozen=True)
class Card:
    """What a rank tells the others about itself."""

    rank: int
    host: str
    address: str
    """Its address on the way to where the ranks meet; a loopback address on rank 0's own host."""
    backend: str
    local_rank: int
    devices: int
    """How many devices it sees; 0 on a CPU."""
    cores: list[int]
    """Numbers of the CPUs that it may run on."""


def own_card(launch: Launch, backend: str, devices: int) -> Card:
    """This process's card."""
    try:
        address = source_address(launch.address or "127.0.0.1")
    except OSError:
        address = ""  # the connection itself will say what is wrong
    cores = sorted(os.sched_getaffinity(0))
    return Card(launch.rank, socket.gethostname(), address, backend, launch.local_rank or 0, devices, cores)


def meet(launch: Launch, mine: Card, timeout_s: float) -> tuple[dist.Store, list[Card]]:
    """Exchange cards with all ranks; returns the store and every rank's card, in rank order.

    Raises UserError, on every rank that came, when ranks are missing after `timeout_s`, with their numbers; and where
    another run's ranks meet already, which is not disturbed.
    """
    store = _open(launch, mine, timeout_s)
    # If another run listens at this port, its store answers: the rank that claimed its number first stays.
    if store.add(f"claim/{launch.rank}", 1) > 1:
        raise UserError(_taken(launch, mine, f"another run's rank {launch.rank} is there"))
    store.set(f"card/{launch.rank}", json.dumps(asdict(mine)))
    place = f"{launch.address}:{launch.port}"
    try:
        if launch.rank == 0:
            store.set("roll", _roll(store, launch.world_size, timeout_s))
        else:
            store.wait(["roll"], timedelta(seconds=timeout_s + _FAREWELL_S))
        roll = json.loads(store.get("roll"))
        if len(roll) != launch.world_size:
            raise UserError(_taken(launch, mine, f"a run of {len(roll)} ranks meets there, not of {launch.world_size}"))
        if None in roll and launch.rank == 0:
            _await_farewells(store, len(roll) - roll.count(None))
        store.add("farewells", 1)
    except dist.DistError as error:
        raise UserError(f"rank {launch.rank} on {mine.host} lost rank 0 at {place} while ranks met: {error}") from error
    if absent := [rank for rank, card in enumerate(roll) if card is None]:
        here = "; ".join(f"rank {card['rank']} on {card['host']}" for card in roll if card)
        raise UserError(
            f"{_ranks(absent)} of {len(roll)} did not come to {place} within {timeout_s:g} s. Here: {here}. Look "
            "whether they started, and what they say; a firewall between nodes is another usual reason"
        )
    return store, [Card(**card) for card in roll]


def check(cards: Sequence[Card]) -> None:
    """Raises UserError if these ranks cannot form a group: on every rank, as all have the same cards."""
    backends = {card.backend: card for card in cards}
    if len(backends) > 1:
        kinds = "; ".join(f"{name} on rank {card.rank} ({card.host})" for name, card in backends.items())
        raise UserError(
            f"the ranks have different devices: backends {kinds}. Look for the host whose accelerator is not found "
            "(`dora-dist env` there), or set engine.accelerator to cpu for all"
        )
    for card in cards:
        if card.local_rank >= card.devices > 1:  # one device: its launcher shows each rank its own
            raise UserError(
                f"rank {card.rank} is local rank {card.local_rank} of {card.host}, but sees {card.devices} devices: "
                f"start at most {card.devices} ranks on it, or let every rank see one device of its own"
            )


def choose_interface(cards: Sequence[Card], launch: Launch) -> None:
    """Let gloo use the network interface that leads to the other hosts, unless GLOO_SOCKET_IFNAME is set.

    By default gloo uses the address of the host's own name, which is often loopback (127.0.1.1 in /etc/hosts).
    """
    mine = cards[launch.rank]
    others = [card for card in cards if card.host != mine.host]
    if not others or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    target = others[0].address if mine.host == cards[0].host else launch.address
    with suppress(OSError):  # then gloo makes its own choice
        address = source_address(target or "")
        for name, addresses in psutil.net_if_addrs().items():
            if any(a.address.split("%")[0] == address for a in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = name


def core_share(cards: Sequence[Card], rank: int) -> int:
    """How many threads a rank should use: its CPUs, each divided by the ranks of its host that may run there; >= 1."""
    mine = cards[rank]
    users = Counter(core for card in cards if card.host == mine.host for core in card.cores)
    return max(1, int(sum(1 / users[core] for core in mine.cores) + 1e-6))


def unreachable(cards: Sequence[Card], launch: Launch, reason: str) -> str:
    """What to say when ranks that met cannot form their process group."""
    hosts = ", ".join(dict.fromkeys(f"{card.host} ({card.address})" for card in cards))
    variable = "GLOO_SOCKET_IFNAME" if cards[0].backend == "gloo" else f"{cards[0].backend.upper()}_SOCKET_IFNAME"
    return (
        f"the ranks met at {launch.address}:{launch.port} but could not connect to one another by "
        f"{cards[0].backend}: {reason} (on {cards[launch.rank].host}; hosts: {hosts}; {variable} = "
        f"{os.environ.get(variable, 'not set')}). Set {variable} to the interface that joins the nodes"
    )


def _open(launch: Launch, mine: Card, timeout_s: float) -> dist.Store:
    assert launch.address is not None and launch.port is not None  # `settle` saw to it
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent keeps the store
    try:
        store = dist.TCPStore(
            launch.address,
            launch.port,
            is_master=launch.rank == 0 and not by_agent,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(_taken(launch, mine, "another program listens there")) from error
        raise UserError(
            f"rank {launch.rank} on {mine.host} cannot meet the others at {launch.address}:{launch.port} (MASTER_ADDR, "
            f"MASTER_PORT), tried for {timeout_s:g} s: {str(error).splitlines()[0]}; look whether rank 0 runs there, "
            "whether the name means that host here too, and at firewalls"
        ) from error
    # torchrun's agent keeps its store when it starts the ranks again, with the keys of those before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if by_agent else "0"
    return dist.PrefixStore(f"dora_dist/{attempt}", store)


def _taken(launch: Launch, mine: Card, how: str) -> str:
    option = PORT_OPTIONS.get(launch.launcher, "MASTER_PORT=N in the environment of all ranks")
    return (
        f"rank {launch.rank} on {mine.host} cannot meet the others at {launch.address}:{launch.port}: this port is "
        f"taken, {how}. Two runs on one machine need two ports; choose a free one: {option}"
    )


def _roll(store: dist.Store, world_size: int, timeout_s: float) -> str:
    """The cards of all ranks as a JSON list; null for a rank that did not come in time."""
    keys = [f"card/{rank}" for rank in range(world_size)]
    with suppress(dist.DistStoreError):  # not all came in time
        store.wait(keys, timedelta(seconds=timeout_s))
    return json.dumps([json.loads(store.get(key)) if store.check([key]) else None for key in keys])


def _await_farewells(store: dist.Store, present: int) -> None:
    """Keep the store, which ends with rank 0's process, until the others have read who is missing."""
    deadline = time.monotonic() + _FAREWELL_S
    while store.add("farewells", 0) < present - 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (" and others" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
