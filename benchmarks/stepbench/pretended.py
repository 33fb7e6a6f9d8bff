"""One process as rank 0 of as many ranks as wanted, none of which exist: their collectives return at once.

What is left of a step is what this host does for it. Numbers that ranks would have sent are whatever memory held.
"""

import json
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from dora_dist.zero3 import flat
from stepbench.measure import Run, quiet, start_engine
from stepbench.settings import Settings


def pretend_main(_: int, form: str, base: Path, settings: Settings, file: Path) -> None:
    """Measure steps as rank 0 of `settings.ranks`, with "our" gathers or "DeepSpeed"'s own; writes `file`."""
    quiet()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    start_engine(0, settings.ranks, threads=1, backend="fake", store=FakeStore())
    if form != "ours":
        flat.ENGINES = ()  # as with a version of DeepSpeed that is not known
    run = Run("dora", base, settings)
    for _ in range(settings.warmup):
        run.step()
    measured = [run.step() for _ in range(settings.steps)]
    with Operations() as operations:
        run.step()
    file.write_text(json.dumps({"cpu_seconds": [cpu for _, cpu in measured], "operations": operations.number}))


class Operations(TorchDispatchMode):
    """Counts operations on tensors: unlike time, their number does not depend on what else the machine does."""

    number = 0

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return operation(*args, **(kwargs or {}))
