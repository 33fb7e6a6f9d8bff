"""What clusters do to a run: signals, dead ranks, ranks that hang, saves cut short. Nothing hangs, nothing is lost."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.manifest import read_manifest
from dora_dist.config import TrainingConfig
from dora_dist.data.reading import held_out
from dora_dist.runtime.exit_codes import DONE, INTERRUPTED, LOST_RANK, STOPPED, USERS_MISTAKE
from dora_dist.runtime.stopping import SAME_PRESS_S
from tests import toy
from tests.distributed.training_runs import config, metrics
from tests.job import Job


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    return toy.training_folder(folder)


def start(folder: Path, name: str, world_size: int, *options: object, **changes: dict[str, Any]) -> Job:
    """A job of up to 12 steps in the run folder `name`, which saves at every second one."""
    changes["training"] = {"max_steps": 12, "micro_batch_size": 2, **changes.get("training", {})}
    changes["checkpoint"] = {"save_every": 2, "keep_last": 3, **changes.get("checkpoint", {})}
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config(folder / "base", folder / "data.json", folder / name, **changes)))
    return Job(folder / f"{name}-logs", world_size, "--config", file, *options)


def endings(run_dir: Path) -> list[str]:
    """How the history says that the run started and ended, each time."""
    lines = [line for line in run_folder.metrics(run_dir) if line["event"] in ("start", "end")]
    return [line.get("how", "start") for line in lines]


def steps_done(run_dir: Path) -> int:
    try:
        return max(metrics(run_dir)["losses"], default=0)
    except (OSError, ValueError):
        return 0


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, float]:
    """Losses by step of a run that nothing disturbs."""
    with start(folder, "undisturbed", 2) as job:
        assert job.codes() == [DONE, DONE], job.output()
    losses: dict[int, float] = metrics(folder / "undisturbed")["losses"]
    assert list(losses) == list(range(1, 13))
    return losses


def go_on(folder: Path, name: str, expected: dict[int, float], **changes: dict[str, Any]) -> None:
    """The run goes on by itself to the end, with the losses of one that nothing disturbed."""
    with start(folder, name, 2, "--resume", **changes) as job:
        assert job.codes() == [DONE, DONE], job.output()
    assert metrics(folder / name)["losses"] == expected


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_which_say_who_it_was(
    folder: Path, expected: dict[int, float], victim: int
) -> None:
    name, random_step = f"killed-{victim}", random.randint(3, 7)
    with start(folder, name, 2) as job:
        # A checkpoint is written while training goes on: that of step 2 may come after the log's line of step 3.
        job.until(
            lambda: steps_done(folder / name) >= random_step and run_folder.newest_checkpoint(folder / name) is not None
        )
        job.send(victim, signal.SIGKILL)
        codes = job.codes(timeout=30)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == LOST_RANK, job.output()
    assert f"lost rank {victim}" in job.said(1 - victim)
    assert f"{folder / name / run_folder.LOG} may have what was printed last" in job.said(1 - victim)
    newest = run_folder.newest_checkpoint(folder / name)
    assert newest is not None and read_manifest(newest)["step"] >= 2
    go_on(folder, name, expected)
    lost = ["lost"] if victim else []  # rank 0 writes the history, and was killed
    assert endings(folder / name) == ["start", *lost, "start", "finished"]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_stands_still_ends_the_others_within_the_timeout(folder: Path, victim: int) -> None:
    """Rank 0 takes the store with it that the ranks met in: it does not answer, and no connection breaks."""
    name, others = f"stopped-{victim}", [rank for rank in range(3) if rank != victim]
    with start(folder, name, 3, engine={"step_timeout_s": 6.0}, checkpoint={"save_every": 1000}) as job:
        job.until(lambda: steps_done(folder / name) >= 2)
        job.send(victim, signal.SIGSTOP)
        for rank in others:
            job.ranks[rank].join(40)
        assert [job.ranks[rank].exitcode for rank in others] == [LOST_RANK, LOST_RANK], job.output()
    assert all(f"lost rank {victim} (host " in job.said(rank) for rank in others)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_another_waits_for_its_device(folder: Path, victim: int) -> None:
    """No exception reaches the one that waits, and its limit for a step is ten minutes."""
    name, waiting = f"device-{victim}", 1 - victim
    with start(folder, name, 2) as job:
        job.until(lambda: steps_done(folder / name) >= 2)
        job.hang(waiting)
        job.send(victim, signal.SIGKILL)
        assert job.codes(timeout=60)[waiting] == LOST_RANK, job.output()
    assert f"lost rank {victim} (host " in job.said(waiting)
    assert endings(folder / name) == (["start", "lost"] if victim else ["start"])


def test_a_main_thread_that_hangs_in_a_process_that_lives_is_named(folder: Path) -> None:
    with start(folder, "hangs", 3, engine={"step_timeout_s": 6.0}, checkpoint={"save_every": 1000}) as job:
        job.until(lambda: steps_done(folder / "hangs") >= 2)
        job.hang(1)
        assert job.codes(timeout=60) == [LOST_RANK] * 3, job.output()
    for rank in range(3):
        assert "lost rank 1 (host " in job.said(rank) and "alive, but for" in job.said(rank)


def test_a_log_that_cannot_be_written_ends_all_ranks(folder: Path) -> None:
    log = folder / "error" / run_folder.METRICS
    with start(folder, "error", 2) as job:
        job.until(lambda: steps_done(folder / "error") >= 2)
        log.unlink()
        log.mkdir()  # the next line of the log cannot be written, on rank 0 alone
        assert job.codes(timeout=30) == [USERS_MISTAKE, USERS_MISTAKE], job.output()
    for rank in (0, 1):
        assert f"{log}: cannot be written" in job.said(rank) and "Traceback" not in job.said(rank)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_any_rank_stops_all_at_one_step_with_a_checkpoint(
    folder: Path, expected: dict[int, float], number: signal.Signals
) -> None:
    name = number.name
    with start(folder, name, 2) as job:
        job.until(lambda: steps_done(folder / name) >= 3)
        job.send(1, number)
        assert job.codes(timeout=30) == [STOPPED, STOPPED], job.output()
    stopped_at = steps_done(folder / name)
    newest = run_folder.newest_checkpoint(folder / name)
    assert newest is not None and run_folder.step_of(newest) == stopped_at < 12
    assert f"at step {stopped_at} of 12; saved {newest}. To go on: the same command with --resume" in job.said(0)
    go_on(folder, name, expected)
    assert endings(folder / name) == ["start", "stopped", "start", "finished"]


def test_a_second_ctrl_c_ends_at_once_whatever_the_process_is_doing(folder: Path) -> None:
    with start(folder, "impatient", 1, training={"max_steps": 1000}) as job:
        job.until(lambda: steps_done(folder / "impatient") >= 2)
        job.hang(0)
        job.send(0, signal.SIGINT)
        job.send(0, signal.SIGINT)  # as a launcher passes on what the terminal has sent already
        job.until(lambda: "Press it again to end at once" in job.said(0))
        started = time.monotonic()
        while job.ranks[0].is_alive() and time.monotonic() - started < 60:
            job.ranks[0].join(SAME_PRESS_S + 0.2)
            if job.ranks[0].is_alive():
                job.send(0, signal.SIGINT)
        assert job.codes() == [INTERRUPTED], job.output()


def test_a_signal_during_a_long_evaluation_stops_all_at_its_next_batch(
    folder: Path, expected: dict[int, float]
) -> None:
    """The same training samples as elsewhere here, and an evaluation that would take minutes."""
    records, name = json.loads((folder / "data.json").read_text()), "evaluating"
    chosen = held_out(len(records), 5, TrainingConfig().seed)
    training = [record for i, record in enumerate(records) if i not in chosen]
    (folder / "training.json").write_text(json.dumps(training))
    toy.write_records(folder / "long.json", 20_000)
    data = {"train": str(folder / "training.json"), "validation": str(folder / "long.json")}
    with start(folder, name, 2, training={"eval_every": 3}, data={**data, "validation_samples": 0}) as job:
        job.until(lambda: steps_done(folder / name) == 3)
        job.send(1, signal.SIGTERM)
        assert job.codes(timeout=30) == [STOPPED, STOPPED], job.output()
    assert not metrics(folder / name)["eval"]  # what was not evaluated to its end is not reported
    newest = run_folder.newest_checkpoint(folder / name)
    assert newest is not None and run_folder.step_of(newest) == 3
    go_on(folder, name, expected, data={"train": data["train"], "validation_samples": 0})


def test_a_signal_while_the_model_loads_stops_at_once(folder: Path) -> None:
    with start(folder, "early", 2) as job:
        job.until(lambda: "\ndata  " in job.said(0))
        job.send(1, signal.SIGTERM)
        assert job.codes(timeout=30) == [STOPPED, STOPPED], job.output()
    assert not list((folder / "early").glob("checkpoint-*"))


def test_a_folder_in_use_is_waited_for(folder: Path) -> None:
    with start(folder, "shared", 1, training={"max_steps": 100_000}) as first:  # far longer than the second
        first.until(lambda: steps_done(folder / "shared") >= 1)
        with start(folder, "shared", 1, "--resume", training={"max_steps": 1}) as second:
            second.until(lambda: "in use by another run" in second.said(0))
            first.send(0, signal.SIGTERM)
            assert first.codes() == [STOPPED]
            assert second.codes() == [DONE], second.output()


def test_killed_at_any_moment_of_a_save_a_run_goes_on(folder: Path) -> None:
    """Twenty times a run that saves at every step is killed and started again."""
    run_dir, chance, cut_short = folder / "saving", random.Random(0), 0
    sizes = {"adapter": {"r": 600, "lora_alpha": 8.0}, "checkpoint": {"save_every": 1, "keep_last": 2}}
    reached = 0
    for _ in range(20):
        with start(folder, "saving", 1, "--resume", training={"max_steps": 10_000}, **sizes) as job:
            job.until(lambda before=reached: steps_done(run_dir) > before)
            time.sleep(chance.uniform(0.0, 0.3))
            job.send(0, signal.SIGKILL)
            job.codes()
        assert ".damaged" not in job.said(0), job.output()  # nothing damaged bore a checkpoint's name
        cut_short += bool(list(run_dir.glob(".checkpoint-*.partial-*")))
        newest = run_folder.newest_checkpoint(run_dir)
        assert newest is not None
        read_manifest(newest)  # every byte is as it was written
        assert run_folder.step_of(newest) >= reached - 1
        reached = run_folder.step_of(newest)
    assert cut_short >= 3  # it was in the middle of saves that it was killed
    with start(folder, "saving", 1, "--resume", training={"max_steps": reached + 1}, **sizes) as job:
        assert job.codes() == [DONE]
    assert not list(run_dir.glob(".checkpoint-*"))
