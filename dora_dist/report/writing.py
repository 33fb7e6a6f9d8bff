"""The page of a run, kept up to date while it trains: training neither waits for the page nor fails with it."""

import threading
import time
from pathlib import Path

from dora_dist.checkpoint.history import END
from dora_dist.checkpoint.run_folder import REPORT
from dora_dist.report import page, reading
from dora_dist.runtime.console import warn
from dora_dist.runtime.folders import new_file

LEAST_S = 15.0
"""Between two writings, and between two looks of a browser."""
SHARE = 0.02
"""Of the processor's time that writing may take at most: it waits longer where the history is long."""
PATIENCE_S = 20.0
"""How long a run that ends waits for its last page."""


class PageWriter:
    """Writes RUN_DIR/report.html in a thread, some time after the history's lines, and once more after its end's.

    What goes wrong is said once, and no page is written any more. For the rank that writes the history.
    """

    def __init__(self, run_dir: Path, *, kept: bool = True, least_s: float = LEAST_S) -> None:
        """`kept`: whether there is to be a page at all."""
        self._run_dir, self._kept, self._least_s = run_dir, kept, least_s
        self._woken, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def hear(self, event: str) -> None:
        """A line of the history has been written: returns at once, but after the last one waits for the page."""
        if not self._kept or self._over.is_set():
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_on, name="report", daemon=True)
            self._thread.start()
        if event == END:
            self._over.set()
        self._woken.set()
        if event == END:
            self._thread.join(PATIENCE_S)  # a thread that hangs in a file server is left to itself

    def _write_on(self) -> None:
        wait_s = 0.0
        try:
            while not self._over.wait(wait_s):
                self._woken.wait()
                self._woken.clear()
                if not self._over.is_set():
                    wait_s = max(self._least_s, self._write(max(self._least_s, wait_s)) / SHARE)
            self._write(None)
        except Exception as error:  # the run matters more than its page
            why = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            warn(
                f"{self._run_dir / REPORT} is not kept up to date: {why}; `dora-dist report {self._run_dir}` writes it"
            )

    def _write(self, reload_s: float | None) -> float:
        """Returns the seconds of the processor that it took; waiting for a disk or for the training hinders nobody."""
        began = time.thread_time()
        text = page.of_run(reading.read(self._run_dir), now=time.time(), reload_s=reload_s and round(reload_s))
        with new_file(self._run_dir / REPORT, alone=True) as partial:
            partial.write_text(text, encoding="utf-8")
        return time.thread_time() - began
