"""`python -m tests.gpu` (`make test-gpu`): the checks on this machine's GPUs, and a table of what they found.

The table goes to runs/test-gpu/report.md and report.json, too. Exit status: pytest's; 3 where there is no GPU.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.gpu.machine import DEVICE, NOT_A_RESULT, described, this_machine

NO_GPU = 3
OUTPUT = ROOT / "runs" / "test-gpu"


class Rows(list[tuple[str, str, str]]):
    """A pytest plugin: what every check is called, how it ended, and what it noted."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            name = report.nodeid.partition("::test_")[2].replace("_", " ")
            notes = "; ".join(f"{key}: {text}" if key else str(text) for key, text in report.user_properties)
            ended = "FAILED" if report.failed else "not run" if notes.startswith("not run") else "passed"
            self.append((name, ended, notes.removeprefix("not run: ")))


def main() -> int:
    machine = this_machine()
    if machine is None:
        print(f"NOT RUN: no GPU here. {DEVICE}=cpu rehearses the checks on two CPU ranks.", file=sys.stderr)
        return NO_GPU
    if not machine.on_gpu:
        print(f"=== {NOT_A_RESULT} ===")
    rows, started = Rows(), time.monotonic()
    checks = str(Path(__file__).with_name("checks.py"))
    status = int(pytest.main([checks, "-q", *sys.argv[1:]], plugins=[rows]))
    report: dict[str, Any] = {"rehearsal": not machine.on_gpu, "machine": described(machine)}
    report |= {"seconds": round(time.monotonic() - started), "checks": rows}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (OUTPUT / "report.md").write_text(as_markdown(report) + "\n")
    print(as_markdown(report))
    print(f"written: {OUTPUT / 'report.md'}, {OUTPUT / 'report.json'}")
    return status


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table that is readable as it is."""
    cells = [("check", "result", "found"), *report["checks"]]
    width = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = [f"| {' | '.join(cell.ljust(wide) for cell, wide in zip(row, width, strict=True))} |" for row in cells]
    lines.insert(1, f"|{'|'.join('-' * (wide + 2) for wide in width)}|")
    passed, total = sum(row[1] == "passed" for row in report["checks"]), len(report["checks"])
    return "\n".join(
        [
            *([f"**{NOT_A_RESULT}**", ""] if report["rehearsal"] else []),
            "; ".join(f"{name} {value}" for name, value in report["machine"].items()),
            "",
            *lines,
            "",
            f"{passed} of {total} checks passed, in {report['seconds']} s",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
