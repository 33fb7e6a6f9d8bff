"""How long a part of a step takes on the device, without making the host wait for it."""

import time
from types import TracebackType
from typing import Any

import torch


class Stopwatch:
    """Adds up the seconds spent inside `with stopwatch.on(device):`.

    On a GPU the host only launches work, so time is taken on the device, by two events in its queue, which are read
    when `seconds` is asked for. On a CPU it is the host's clock.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pairs: list[tuple[Any, Any]] = []
        self._device = torch.device("cpu")

    def on(self, device: torch.device) -> "Stopwatch":
        """Measure work that is queued on `device`."""
        self._device = device
        return self

    @property
    def seconds(self) -> float:
        """The sum so far. Waits for the device until what was measured is done."""
        for start, end in self._pairs:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        self._pairs.clear()
        return self._seconds

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._started, float):
            self._seconds += time.perf_counter() - self._started
        else:
            self._pairs.append((self._started, self._now()))

    def _now(self) -> Any:
        device = torch.get_device_module(self._device)
        if self._device.type == "cpu" or not hasattr(device, "Event"):
            return time.perf_counter()
        event = device.Event(enable_timing=True)
        event.record()
        return event
