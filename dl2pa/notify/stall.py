"""Detection of a run without progress, from outside its processes."""

from __future__ import annotations

import time
from collections.abc import Callable

from dl2pa.rundir import RunDirectory


class StallWatch:
    """Watches the status of a run, which the training writes at every log interval, validation and end.

    Args:
        after_s: time without progress; 0 never reports a stall.
    """

    def __init__(
        self, run: RunDirectory, after_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run = run
        self._after_s = after_s
        self._clock = clock
        self._seen = self._mark()
        self._since = clock()
        self._reported = False

    def check(self) -> float | None:
        """Seconds without progress if the run has stalled; None otherwise, and after the stall was reported."""
        mark, now = self._mark(), self._clock()
        if mark != self._seen:
            self._seen, self._since, self._reported = mark, now, False
        if self._reported or not self._after_s or now - self._since < self._after_s:
            return None
        if self._run.status().get("state") == "finished":
            return None
        self._reported = True
        return now - self._since

    def _mark(self) -> tuple[int, int] | None:
        """Identity of the status file, which is replaced by each write."""
        try:
            status = self._run.status_file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino
