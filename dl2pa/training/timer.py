"""What happened between two log points, by the clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class StepTimings:
    """What a window held: seconds in all, images, and the duration of each step in seconds."""

    seconds: float
    images: int
    steps: list[float]

    def step_percentiles(self) -> dict[str, float]:
        """Milliseconds a step by percentile, interpolated between neighbors; nothing where there was no step."""
        if not self.steps:
            return {}
        found = np.percentile(self.steps, PERCENTILES) * 1000.0
        return {f"step_ms_p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}


class StepTimer:
    """Wall time, images and steps between two log points, and the time spent waiting for data.

    A step lasts from asking for its batch to the end of its update; matchings, checkpoints and log points are
    not in it. On a GPU that is the device's time, marked by events that nobody waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self.images = 0
        self._gpu = device.type == "cuda"
        self._seconds = 0.0
        self._waited = 0.0
        self._since: float | None = None
        self._asked = 0.0
        self._begin: Any = None
        self._steps: list[tuple[Any, Any]] = []
        self._spare: list[Any] = []

    def open(self) -> None:
        self._since = time.perf_counter()
        self.asks_data()

    def asks_data(self) -> None:
        """The loop turns to the pipeline for the next batch."""
        self._asked = time.perf_counter()
        if self._begin is not None and self._gpu:
            self._spare.append(self._begin)  # a matching or a log point lay between
        self._begin = self._mark()

    def got_data(self) -> None:
        self._waited += time.perf_counter() - self._asked

    def stepped(self, images: int) -> None:
        """The step on that batch is done, or handed to the device."""
        self.images += images
        self._steps.append((self._begin, self._mark()))
        self._begin = None

    def close(self) -> float:
        """Seconds since it was opened."""
        if self._since is None:
            return 0.0
        passed = time.perf_counter() - self._since
        self._seconds += passed
        self._since = None
        return passed

    def take_waited(self) -> float:
        """Seconds waited for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def read(self) -> StepTimings:
        """What passed since the last reading. On a GPU it waits for the last step."""
        if self._gpu and self._steps:
            self._steps[-1][1].synchronize()
        durations = [self._between(*step) for step in self._steps]
        if self._gpu:
            self._spare += [event for step in self._steps for event in step]
        passed = StepTimings(self._seconds, self.images, durations)
        self._seconds, self.images, self._steps = 0.0, 0, []
        return passed

    def _mark(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000.0 if self._gpu else end - begin
