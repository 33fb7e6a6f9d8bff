"""What a process of a run has of the other ranks."""

from dataclasses import dataclass

from dora_dist.runtime.distributed import World
from dora_dist.runtime.stopping import StopRequest
from dora_dist.runtime.watch import Watch


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run, and what ends them together: the watch over all, a signal to stop."""

    world: World
    watch: Watch
    stop: StopRequest
