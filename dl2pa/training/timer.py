"""Wall-clock time between two log points: steps, images, waiting for data."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class StepTimings:
    """Total seconds, number of images, and the duration of each step in seconds."""

    seconds: float
    images: int
    steps: list[float]

    def step_percentiles(self) -> dict[str, float]:
        """Milliseconds per step by percentile, linearly interpolated; empty without steps."""
        if not self.steps:
            return {}
        values = np.percentile(self.steps, PERCENTILES) * 1000.0
        return {f"step_ms_p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}


class StepTimer:
    """Measures wall time, images, steps and the time spent waiting for data.

    A step lasts from requesting its batch to the end of its weight update; assignment updates, checkpoints and
    logging are excluded. On a GPU, CUDA events measure the device's time without a synchronization per step.
    """

    def __init__(self, device: torch.device) -> None:
        self.images = 0
        self._gpu = device.type == "cuda"
        self._seconds = 0.0
        self._data_wait = 0.0
        self._started: float | None = None
        self._requested = 0.0
        self._begin: Any = None
        self._steps: list[tuple[Any, Any]] = []
        self._spare_events: list[Any] = []

    def start(self) -> None:
        """Start or continue measuring."""
        self._started = time.perf_counter()
        self.data_requested()

    def data_requested(self) -> None:
        """Call before the next batch is requested."""
        self._requested = time.perf_counter()
        if self._begin is not None and self._gpu:
            self._spare_events.append(self._begin)  # no step followed the previous request
        self._begin = self._mark()

    def data_received(self) -> None:
        """Call when the batch has arrived."""
        self._data_wait += time.perf_counter() - self._requested

    def step_done(self, images: int) -> None:
        """Call when the step is done, or queued on the device."""
        self.images += images
        self._steps.append((self._begin, self._mark()))
        self._begin = None

    def pause(self) -> float:
        """Stop measuring; seconds since the start."""
        if self._started is None:
            return 0.0
        seconds = time.perf_counter() - self._started
        self._seconds += seconds
        self._started = None
        return seconds

    def take_data_wait(self) -> float:
        """Seconds spent waiting for data since the last call."""
        seconds, self._data_wait = self._data_wait, 0.0
        return seconds

    def read(self) -> StepTimings:
        """Timings since the last call. On a GPU this waits for the last step."""
        if self._gpu and self._steps:
            self._steps[-1][1].synchronize()
        durations = [self._duration(*step) for step in self._steps]
        if self._gpu:
            self._spare_events += [event for step in self._steps for event in step]
        timings = StepTimings(self._seconds, self.images, durations)
        self._seconds, self.images, self._steps = 0.0, 0, []
        return timings

    def _mark(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = self._spare_events.pop() if self._spare_events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _duration(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000.0 if self._gpu else end - begin
