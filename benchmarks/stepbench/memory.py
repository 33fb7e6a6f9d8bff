"""The memory that a command and all that it starts have together, at its peak."""

import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


def run_measured(command: list[str | Path], log: Path, **options: Any) -> dict[str, float]:
    """Run a command; its seconds, and the largest sum of its processes' memory, looked at five times a second.

    A page that several processes share counts once (PSS, Linux). The output goes to `log`; raises SystemExit with its
    end if the command fails. The command ends with this process's interruption.
    """
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
        try:
            with _Peak(process.pid) as peak:
                code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {code}:\n{log.read_text(errors='replace')[-3000:]}")
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak.bytes}


class _Peak:
    """Looks at a process and its children until the context ends."""

    def __init__(self, pid: int) -> None:
        self._root, self._over, self.bytes = psutil.Process(pid), threading.Event(), 0.0
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Peak":
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            with suppress(psutil.Error):
                self.bytes = max(self.bytes, sum(map(_pss, [self._root, *self._root.children(recursive=True)])))


def _pss(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return float(process.memory_full_info().pss)
    return 0.0
