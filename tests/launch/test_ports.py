"""Two runs on one machine that would meet at one port, and what a run's end looks like to whoever started it."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dora_dist.runtime.exit_codes import USERS_MISTAKE
from dora_dist.runtime.launchers import free_port
from tests import toy
from tests.distributed.training_runs import config, metrics
from tests.launch.test_launch import ROOT, type_in
from tests.launch.test_launchers import MPIRUN

TRAIN = ("launch/train.py", "--config")


class LongRun:
    """Two ranks that train until they are ended, started by `deepspeed` at `port`."""

    def __init__(self, folder: Path, port: int) -> None:
        self.run_dir, self.log, self.port = folder / "first", folder / "first.log", port
        file = folder / "first.json"
        settings = {"training": {"max_steps": 10**6}, "checkpoint": {"save_every": None}}
        file.write_text(json.dumps(config(folder / "base", folder / "data.json", self.run_dir, **settings)))
        command = ["deepspeed", "--master_port", str(port), "--num_accelerators", "2", *TRAIN, str(file)]
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def steps(self) -> int:
        try:
            return max(metrics(self.run_dir)["losses"], default=0)
        except (OSError, ValueError):
            return 0

    def goes_on(self) -> None:
        """Wait for two more steps."""
        before = self.steps()
        while self.steps() < before + 2:
            assert self.launcher.poll() is None, self.log.read_text()
            try:
                self.launcher.wait(0.2)
            except subprocess.TimeoutExpired:
                continue

    def kill_rank(self, rank: int) -> None:
        for process in psutil.Process(self.launcher.pid).children(recursive=True):
            if process.environ().get("RANK") == str(rank):
                process.kill()
                return
        raise AssertionError(f"there is no rank {rank}")

    def end(self) -> None:
        if self.launcher.poll() is None:
            os.killpg(self.launcher.pid, signal.SIGKILL)
        self.launcher.wait()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LongRun]:
    folder = toy.training_folder(tmp_path_factory.mktemp("ports"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
        patch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        run = LongRun(folder, free_port())
        try:
            run.goes_on()
            yield run
        finally:
            run.end()


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_a_second_run_at_the_port_says_how_to_choose_another_and_leaves_the_first_alone(
    first: LongRun, launcher: str
) -> None:
    start, option = {
        "deepspeed": (
            ("deepspeed", "--master_port", first.port, "--num_accelerators", "3", "--no_python"),
            "deepspeed --master_port N",
        ),
        "mpirun": (
            (*MPIRUN, "-n", "2", "-x", "MASTER_ADDR=127.0.0.1", "-x", f"MASTER_PORT={first.port}"),
            "mpirun -x MASTER_PORT=N",
        ),
    }[launcher]
    second = type_in(*start, "dora-dist", "env", timeout=100)
    assert second.returncode == USERS_MISTAKE, second.stdout + second.stderr
    said = second.stdout + second.stderr
    assert f"cannot meet the others at 127.0.0.1:{first.port}: this port is taken" in said
    assert f"choose a free one: {option}" in said
    assert "Traceback" not in said and "frame #" not in said
    first.goes_on()


def test_no_native_stack_is_shown_when_the_rank_that_holds_the_store_is_lost(first: LongRun) -> None:
    """The last test here: it ends the run."""
    first.kill_rank(0)
    first.launcher.wait(60)
    said = first.log.read_text()
    assert "error on rank 1: lost rank 0" in said
    assert "frame #" not in said and "Traceback" not in said
