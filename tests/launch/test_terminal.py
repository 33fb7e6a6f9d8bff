"""A run in a real terminal, in a file, and where its output goes away: what a person sees, and how it ends."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.manifest import MANIFEST
from dora_dist.runtime.exit_codes import DONE, STOPPED, USERS_MISTAKE
from tests import toy
from tests.conftest import ROOT
from tests.distributed.training_runs import config
from tests.terminal import CTRL_C, Terminal

TRAIN = str(ROOT / "launch" / "train.py")
DEEPSPEED = ["deepspeed", "--log_level", "error", "--master_port"]
OPENING = "run ranks data validation model adapter batch training memory files"
CLOSING = "finished loss result adapter merge evaluate"
BLOCK = re.compile(rf"({'|'.join([*OPENING.split(), *CLOSING.split()])}) ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.training_folder(tmp_path_factory.mktemp("terminal"))


@pytest.fixture
def port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = s.getsockname()[1]
    return str(free)


def written(folder: Path, name: str, **training: Any) -> list[str]:
    """Options of a run in the folder `name`."""
    training = {"max_steps": 4, "eval_every": 2, **training}
    file = folder / f"{name}.json"
    changes = {"training": training, "logging": {"progress_bar": True}, "data": {"cutoff_len": 512}}
    raw = config(Path("base"), Path("data.json"), Path(name), **changes)
    file.write_text(json.dumps(raw))
    return ["--config", file.name]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_in_a_terminal(folder: Path, columns: int) -> None:
    name = f"wide-{columns}"
    command = [sys.executable, TRAIN, *written(folder, name)]
    terminal = Terminal(columns, command, folder=folder)
    assert terminal.end() == DONE, terminal.text
    lines = terminal.text.splitlines()
    assert not any("Warning" in line or "Traceback" in line for line in lines)
    _, opening, table, closing = (part.splitlines() for part in terminal.text.split("\n\n"))
    # Wrapped by us, at the labels, and not by the terminal wherever its edge is.
    assert all(BLOCK.match(line) or line.startswith(" " * 12) for line in [*opening, *closing]), terminal.text
    assert [line.split()[0] for line in opening if BLOCK.match(line)] == OPENING.split()
    assert [line.split()[0] for line in closing if BLOCK.match(line)] == CLOSING.split()
    assert ("memory" in table[0].split()) == (columns == 120)
    assert all(len(line.split()) > 1 for line in table), terminal.text
    assert [line.split()[0] for line in table if "." in line.split()[1]] == ["1/4", "2/4", "3/4", "4/4"]
    assert sum("evaluation: loss" in line for line in table) == 2
    assert "FutureWarning" in (folder / name / run_folder.LOG).read_text()
    assert closing[-2] == f"merge       dora-dist consolidate {name} --output merged/"


def test_ctrl_c_under_a_launcher_saves_and_says_how_to_go_on(folder: Path, port: str) -> None:
    options = written(folder, "ctrl-c", max_steps=10_000, eval_every=None)
    terminal = Terminal(80, [*DEEPSPEED, port, "--num_accelerators", "2", TRAIN, *options], folder=folder)
    terminal.until(lambda text: " 2/10,000 " in text)
    terminal.press(CTRL_C)
    terminal.end()
    text = terminal.text
    newest = run_folder.newest_checkpoint(folder / "ctrl-c")
    assert newest is not None, text
    assert "Ctrl-C: saving after this step" in text
    said = " ".join(text.split())
    assert f"saved ctrl-c/{newest.name}. To go on: the same command with --resume" in said
    assert text.count("stopped: ") == 1 and text.count("Ctrl-C: ") == 1
    goes_on = Terminal(80, [sys.executable, TRAIN, *options, "--resume"], folder=folder)
    assert f"goes on from {newest.name}" in goes_on.until(lambda text: "goes on from" in text)
    goes_on.press(CTRL_C)
    goes_on.end()


def in_a_shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", line], cwd=folder, text=True, capture_output=True, env=os.environ, check=False)


def test_output_that_nobody_reads_ends_no_run(folder: Path) -> None:
    train = f"{sys.executable} {TRAIN} {' '.join(written(folder, 'unread', eval_every=None))}"
    ran = in_a_shell(folder, f"{train} | head -n 1; exit ${{PIPESTATUS[0]}}")
    assert ran.returncode == DONE and ran.stderr == "", ran.stderr
    assert ran.stdout.startswith("dora_dist ") and ran.stdout.count("\n") == 1
    ran = in_a_shell(folder, f"{train} --checkpoint.run_dir closed <&- >&- 2>&-")
    assert ran.returncode == DONE
    for name in ("unread", "closed"):
        assert (folder / name / "checkpoint-4" / MANIFEST).exists()
        assert "finished" in (folder / name / run_folder.LOG).read_text()


def test_a_full_disk_is_no_traceback(folder: Path) -> None:
    train = f"{sys.executable} {TRAIN} {' '.join(written(folder, 'full', eval_every=None))}"
    # 16 KiB a file: the configuration and the history fit, checkpoints do not
    ran = in_a_shell(folder, f"ulimit -f 16; {train}")
    assert ran.returncode == USERS_MISTAKE, ran.stderr
    assert "cannot be written: File too large" in ran.stderr and "Traceback" not in ran.stdout + ran.stderr
    assert "\r" not in ran.stdout


def test_a_terminal_that_is_closed_stops_a_run_with_a_checkpoint(folder: Path) -> None:
    options = written(folder, "hung-up", max_steps=10_000, eval_every=None)
    train = [sys.executable, TRAIN, *options]
    with subprocess.Popen(train, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " 2/10,000 " in line:
                break
        process.stdout.close()
        process.send_signal(1)
        assert process.wait(60) == STOPPED
    assert run_folder.newest_checkpoint(folder / "hung-up") is not None
