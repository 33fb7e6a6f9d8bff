"""One run, top to bottom: check, start ranks, read, build, train, save."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dist.config import RunConfig
from dora_dist.runtime import distributed, plugins
from dora_dist.runtime.folders import DISK_IS_FULL, disk_errors
from dora_dist.runtime.launchers import rank_among_several
from dora_dist.runtime.run_log import RunLog
from dora_dist.runtime.stopping import StopRequest
from dora_dist.runtime.watch import Watch
from dora_dist.training.checks import check
from dora_dist.training.ranks import Ranks

if TYPE_CHECKING:
    from transformers import TrainerCallback


def train(config: RunConfig, callbacks: "Sequence[TrainerCallback]" = ()) -> Path:
    """Fine-tune as a configuration says, on however many ranks the launcher started.

    Args:
        config: the run: `RunConfig.load(FILE, OVERRIDES)` or `RunConfig.from_dict(DICT)`.
        callbacks: Hugging Face's, told of every step after the run's own, on every rank; what one asks for by `control`
            it asks for on all ranks, or they would wait for each other. With dynamic rank they see two trainings, of a
            model and of the smaller one that goes on from it.

    Returns: the folder of the newest checkpoint, `RUN_DIR/checkpoint-STEP`; its `adapter/` is a PEFT folder.

    Raises: UserError, on every rank, for everything that a user can fix; what can be checked without ranks is checked
    before a process group exists. Stopped where a signal ended the run (what it had learnt is saved), LostRank where
    another rank is gone.

    Example::

        config = RunConfig.load("configs/quickstart.json", ["--training.max_steps=10"])
        checkpoint = train(config)
    """
    started = time.perf_counter()
    plugins.load(config.plugins)
    check(config)
    with RunLog(rank_among_several(os.environ) or 0) as log, StopRequest() as stop:
        distributed.leave_nccl_errors_to_the_watch()
        world = distributed.start(config.engine.start_timeout_s)
        # Imported here: DeepSpeed needs its accelerator chosen and its environment set first, and a mistake in the
        # configuration should show at once, not after the seconds that libraries take.
        from dora_dist.checkpoint.history import History
        from dora_dist.report.writing import PageWriter
        from dora_dist.training import blocks, phases
        from dora_dist.training.trackers import Trackers

        run_dir, timeout_s = Path(config.checkpoint.run_dir), config.engine.start_timeout_s
        page = PageWriter(run_dir, kept=config.logging.report)
        with (
            Trackers(config, first=world.first) as trackers,
            History(run_dir, first=world.first, heard=page.hear) as history,
            Watch(world, timeout_s, told=history.lost) as watch,
            disk_errors(run_dir, only=DISK_IS_FULL),
        ):
            checkpoint = phases.run(
                config, Ranks(world, watch, stop), log, history=history, trackers=trackers, callbacks=callbacks
            )
        if world.first:
            blocks.closing(checkpoint, time.perf_counter() - started)
    return checkpoint
