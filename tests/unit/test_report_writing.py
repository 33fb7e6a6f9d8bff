"""The page of a run that goes on: written beside it, whole at every moment, and never in its way."""

import os
import time
from pathlib import Path

import pytest

from dora_dist.checkpoint.history import History
from dora_dist.report.writing import PageWriter
from dora_dist.runtime.errors import Stopped
from tests import report_runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return report_runs.write(tmp_path / "run", report_runs.history(100, ended=False))


def test_the_history_is_followed_and_its_end_is_on_the_page(run: Path) -> None:
    file = run / "report.html"
    history = History(run, first=True, heard=PageWriter(run, least_s=3600).hear)
    with pytest.raises(Stopped), history:
        history.begin(100, steps=120)
        while not file.exists():
            time.sleep(0.01)
        first = file.read_text()
        for _ in range(100):  # within the least time: nothing more is written, and nothing waits
            history.add("log", loss=0.5)
        assert file.read_text() == first
        raise Stopped("SIGTERM at step 100")
    assert "<title>Training · run</title>" in first
    text = file.read_text()
    assert "<title>Stopped · run</title>" in text
    assert "SIGTERM at step 100" in text
    assert sorted(path.name for path in run.iterdir() if "partial" in path.name) == []


def test_a_page_is_never_seen_in_part(run: Path) -> None:
    seen: list[str] = []
    writer = PageWriter(run, least_s=0.0)
    while len(set(seen)) < 3:  # the time is on it
        writer.hear("log")
        if (run / "report.html").exists():
            seen.append((run / "report.html").read_text())
    writer.hear("end")
    assert all(text.endswith("</html>") for text in seen)


def test_a_run_that_wants_none_gets_no_page(run: Path) -> None:
    writer = PageWriter(run, kept=False)
    for event in ("start", "end"):
        writer.hear(event)
    assert not (run / "report.html").exists()


def test_a_page_that_cannot_be_written_is_said_once_and_the_run_goes_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkdir(run / "report.html")  # what nobody can rename a file over
    writer = PageWriter(run, least_s=0.0)
    for event in ["log"] * 50 + ["end"]:
        writer.hear(event)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("report.html is not kept up to date: Is a directory") == 1
