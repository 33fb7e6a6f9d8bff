"""What ranks make of one another's cards. That they find one another is tested in tests/launch and tests/cluster."""

import os

import psutil
import pytest

from dora_dist.runtime.errors import UserError
from dora_dist.runtime.launchers import Launch
from dora_dist.runtime.rendezvous import Card, check, choose_interface, core_share


def card(rank: int, host: str, cores: list[int], address: str = "127.0.0.1") -> Card:
    return Card(rank, host, address, "gloo", rank, 0, cores)


def test_ranks_that_may_use_all_cores_share_them() -> None:
    cards = [card(0, "a", list(range(8))), card(1, "a", list(range(8))), card(2, "b", list(range(8)))]
    assert [core_share(cards, rank) for rank in range(3)] == [4, 4, 8]


def test_ranks_that_their_launcher_bound_keep_what_they_have() -> None:
    cards = [card(0, "a", [0, 1, 2, 3]), card(1, "a", [4, 5, 6, 7]), card(2, "a", [6, 7])]
    assert [core_share(cards, rank) for rank in range(3)] == [4, 3, 1]
    crowded = [card(rank, "a", [0]) for rank in range(3)]
    assert core_share(crowded, 2) == 1


def on_gpus(local_rank: int, devices: int, backend: str = "nccl") -> Card:
    return Card(local_rank, "a", "127.0.0.1", backend, local_rank, devices, [0])


def test_ranks_that_can_form_a_group() -> None:
    check([on_gpus(rank, 4) for rank in range(4)])
    check([on_gpus(rank, 1) for rank in range(4)])  # srun --gpus-per-task=1: each sees its own as number 0
    check([on_gpus(rank, 0, "gloo") for rank in range(4)])


def test_ranks_that_cannot_say_which_and_why() -> None:
    with pytest.raises(UserError, match="rank 2 is local rank 2 of a, but sees 2 devices: start at most 2"):
        check([on_gpus(rank, 2) for rank in range(4)])
    with pytest.raises(UserError, match=r"backends nccl on rank 0 \(a\); gloo on rank 1 \(a\)"):
        check([on_gpus(0, 1), on_gpus(1, 0, "gloo")])


def interface_after(cards: list[Card], launch: Launch) -> str | None:
    choose_interface(cards, launch)
    return os.environ.get("GLOO_SOCKET_IFNAME")


def test_the_interface_is_the_one_on_the_way_to_the_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    # "there" is this machine by its loopback address, so the way there is the loopback interface.
    cards = [card(0, "here", [0]), card(1, "there", [0], "127.0.0.1")]
    first, second = (Launch("srun", rank, 2, 0, 1, "127.0.0.1", 1234) for rank in range(2))
    assert interface_after(cards, first) == "mine"  # the user's choice counts

    loopback = next(name for name, all in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in all))
    for launch in (first, second):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        assert interface_after(cards, launch) == loopback
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert interface_after([card(0, "here", [0]), card(1, "here", [0])], first) is None  # one host: no network
    unknown = [card(0, "here", [0]), card(1, "there", [0], "no-such-host.invalid")]
    assert interface_after(unknown, first) is None
