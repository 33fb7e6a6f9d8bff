"""Two network namespaces of this machine, joined by a pair of virtual interfaces with a rate (Linux, as root).

A rank enters its namespace and then reaches the other only over that wire. Files are shared, so ranks meet at one.
"""

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

CLONE_NEWNET = 0x40000000
ADDRESSES = ("10.213.77.1", "10.213.77.2")  # seen by nobody outside of the namespaces
NEEDED = {"ip": "iproute2", "tc": "iproute2"}


class Wire:
    """The names of namespaces and interfaces, which have this process's id in them: several wires do not meet."""

    def __init__(self) -> None:
        self.namespaces = [f"dd-{os.getpid()}-{side}" for side in range(2)]
        self.interfaces = [f"dd{os.getpid()}{'ab'[side]}" for side in range(2)]

    def enter(self, side: int) -> None:
        """Move the calling thread, and those that it starts, into a namespace: before anything opens a socket."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.namespaces[side]}") as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), namespace.name)
        os.environ.update(GLOO_SOCKET_IFNAME=self.interfaces[side], NCCL_SOCKET_IFNAME=self.interfaces[side])


def missing() -> list[str]:
    """Why there can be no wire here; empty if there can."""
    reasons = [] if os.geteuid() == 0 else ["it makes network namespaces, for which it must run as root"]
    if not os.path.exists("/proc/self/ns/net"):
        return ["it needs Linux, whose network namespaces it joins by a wire"]
    return reasons + [
        f"{name} is missing (Debian: {package})" for name, package in NEEDED.items() if not shutil.which(name)
    ]


@contextmanager
def wire(gigabits: float) -> Iterator[Wire]:
    """A wire of that many Gbit/s each way, taken down however the context is left.

    SIGTERM ends it as Ctrl-C does. Raises RuntimeError with the command that failed.
    """
    made = Wire()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for namespace in made.namespaces:
            _run("ip", "netns", "add", namespace)
        a, b = made.interfaces
        _run(
            "ip",
            "link",
            "add",
            a,
            "netns",
            made.namespaces[0],
            "type",
            "veth",
            "peer",
            "name",
            b,
            "netns",
            made.namespaces[1],
        )
        for namespace, interface, address in zip(made.namespaces, made.interfaces, ADDRESSES, strict=True):
            inside = ("ip", "-n", namespace)
            _run(*inside, "addr", "add", f"{address}/24", "dev", interface)
            _run(*inside, "link", "set", interface, "up")
            _run(*inside, "link", "set", "lo", "up")
            # The bucket holds what may leave at once: a timer's tick of a fast wire's bytes.
            burst = f"{max(128, int(gigabits * 128))}kb"
            shape = ("tbf", "rate", f"{gigabits:g}gbit", "burst", burst, "latency", "50ms")
            _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *shape)
        yield made
    finally:
        signal.signal(signal.SIGTERM, before)
        for namespace in made.namespaces:  # its interfaces go with it
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr.strip() or ended.stdout.strip()}")


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


def received_bytes() -> int:
    """What the interfaces of this thread's network namespace have received, all but the loopback (Linux; else 0)."""
    listing = Path("/proc/thread-self/net/dev")
    lines = listing.read_text().splitlines()[2:] if listing.exists() else []
    counters = {name.strip(): numbers.split() for name, _, numbers in (line.partition(":") for line in lines)}
    return sum(int(numbers[0]) for name, numbers in counters.items() if name != "lo")
