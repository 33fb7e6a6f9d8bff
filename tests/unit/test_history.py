"""The history of a run: what a start writes, what a resume keeps of it, and what a killed process leaves."""

from pathlib import Path

import pytest

from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.history import History
from dora_dist.runtime.errors import LostRank, Stopped, UserError


def course(run_dir: Path, first: bool = True) -> None:
    with pytest.raises(Stopped), History(run_dir, first=first) as history:
        history.begin(0, ranks=2)
        for step in (1, 2, 3):
            history.step = step
            history.add("log", loss=float("nan") if step == 2 else 0.5)
        raise Stopped("SIGTERM at step 3")


def test_each_line_says_what_happened_and_when(tmp_path: Path) -> None:
    course(tmp_path)
    start, *steps, end = run_folder.metrics(tmp_path)
    assert (start["event"], start["step"], start["ranks"]) == ("start", 0, 2)
    assert [line["loss"] for line in steps] == [0.5, None, 0.5]  # a page could not read NaN
    assert (end["how"], end["text"], end["step"]) == ("stopped", "SIGTERM at step 3", 3)
    times = [line["time"] for line in (start, *steps, end)]
    assert times == sorted(times)


def test_a_run_that_goes_on_keeps_its_starts_and_drops_what_will_happen_again(tmp_path: Path) -> None:
    course(tmp_path)
    with (tmp_path / run_folder.METRICS).open("a") as file:
        file.write('{"event": "log", "step": 4, "lo')  # cut by a crash
    assert len(run_folder.metrics(tmp_path)) == 5
    run_folder.forget_after(tmp_path, 2)
    with History(tmp_path, first=True) as history:
        history.begin(2)
        history.step = 3
        history.add("log", loss=0.4)
    found = [(line["event"], line["step"]) for line in run_folder.metrics(tmp_path)]
    before = [("start", 0), ("log", 1), ("log", 2), ("end", 3)]
    assert found == [*before, ("start", 2), ("log", 3), ("end", 3)]


@pytest.mark.parametrize(
    ("error", "how"), [(LostRank("lost rank 1"), "lost"), (UserError("no"), "failed"), (RuntimeError(), "failed")]
)
def test_how_it_ended(tmp_path: Path, error: Exception, how: str) -> None:
    with pytest.raises(type(error)), History(tmp_path, first=True) as history:
        history.begin(0)
        raise error
    assert run_folder.metrics(tmp_path)[-1]["how"] == how


def test_the_first_reason_counts_and_a_run_that_never_began_writes_nothing(tmp_path: Path) -> None:
    with History(tmp_path, first=True) as history:
        history.begin(0)
        history.lost("rank 1 is gone")
    assert [line.get("text") for line in run_folder.metrics(tmp_path)] == [None, "rank 1 is gone"]
    with pytest.raises(UserError), History(tmp_path / "refused", first=True):
        raise UserError("refused")
    course(tmp_path / "other rank", first=False)
    assert not (tmp_path / "refused").exists() and not (tmp_path / "other rank").exists()


def test_a_line_separator_in_a_text_does_not_cut_its_line(tmp_path: Path) -> None:
    with History(tmp_path, first=True) as history:
        history.begin(0)
        history.add("log", text="one\u2028two\u0085three")
        history.step = 5
        history.add("log")
    run_folder.forget_after(tmp_path, 2)
    assert [line.get("text") for line in run_folder.metrics(tmp_path)] == [None, "one\u2028two\u0085three", ""]
