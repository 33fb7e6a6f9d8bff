"""What a person sees and what the run's log takes, whatever becomes of the streams."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dora_dist.runtime.console import Lasting

SCRIPT = """
import os, sys, warnings, logging
from pathlib import Path
from dora_dist.runtime.console import complain, note, say, warn
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.run_log import RunLog

say("before")
handler = None
try:
    with RunLog(int(os.environ.get("RANK", "0"))) as log:
        print("early noise")
        os.system("echo from a child process")
        if "lost" in sys.argv:
            raise RuntimeError("unexpected")
        if "refused" in sys.argv:
            raise UserError("expected")
        log.move_into(Path(sys.argv[1]) / "run" / "run.log")
        logging.basicConfig(format="%(message)s")
        warnings.warn("a warning")
        logging.warning("logged")
        print("drawn\\rover\\rlast")
        say("for people"); note("good"); warn("doubtful"); complain("bad")
        print("no newline", end="")
        if "fails" in sys.argv:
            raise RuntimeError("unexpected")
except (RuntimeError, UserError) as error:
    print(f"left by {error}")
logging.warning("logged later")
print("after")
"""


def script(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-W", "default", "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(words, env={**os.environ, **environment}, text=True, capture_output=True, check=True)


def test_people_see_what_is_said_and_the_log_has_everything(tmp_path: Path) -> None:
    ran = script(tmp_path)
    assert ran.stdout == "before\nfor people\nnote: good\nwarning: doubtful\nafter\n"
    assert ran.stderr == "bad\nlogged later\n"
    log = (tmp_path / "run" / "run.log").read_text()
    in_order = ["early noise", "from a child process", "a warning", "logged", "last", "for people", "note: good"]
    places = [log.index(text) for text in [*in_order, "warning: doubtful", "bad", "no newline"]]
    assert places == sorted(places)
    assert "drawn" not in log and "after" not in log
    assert re.search(r"^\d\d:\d\d:\d\d \[rank 0\] early noise$", log, re.MULTILINE)


def test_other_ranks_speak_in_the_log_alone(tmp_path: Path) -> None:
    script(tmp_path)
    ran = script(tmp_path, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1")
    assert ran.stdout == "after\n"
    assert ran.stderr == "bad\nlogged later\n"  # errors are every rank's to say
    log = (tmp_path / "run" / "run.log").read_text()
    assert "[rank 0] early noise" in log and "[rank 1] early noise" in log


def test_a_log_without_a_folder_is_shown_where_nobody_expected_the_end(tmp_path: Path) -> None:
    lost, refused, failed = (script(tmp_path, how) for how in ("lost", "refused", "fails"))
    assert "early noise" in lost.stderr and "from a child process" in lost.stderr
    assert "noise" not in refused.stderr + failed.stderr
    assert "RuntimeError: unexpected" in (tmp_path / "run" / "run.log").read_text()


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    ran = script(tmp_path)
    assert "run.log cannot be written" in ran.stdout and "for people" in ran.stdout


@pytest.mark.parametrize("how", ["a closed pipe", "a full disk", "closed"])
def test_a_stream_that_goes_away_ends_nothing(how: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = open("/dev/full", "w") if how == "a full disk" else os.fdopen(writer, "w")  # noqa: SIM115
    if how == "closed":
        stream.close()
    lasting = Lasting(stream)
    assert lasting.write("text\n") == 5 and not lasting.isatty()
    lasting.flush()
    Lasting(None).write("nothing is there\n")
    with suppress(OSError):
        stream.close()
