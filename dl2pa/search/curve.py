"""Validation curve of a run, read from its own record of events while it trains."""

from __future__ import annotations

import math
from pathlib import Path

from dl2pa.rundir import RunDirectory
from dl2pa.tracking.spool import read_events


class Curve:
    """Values of one metric of a run, by epoch; each call of `read` reads what was added.

    Args:
        metric: name of the result, for example `top1`.
        steps_per_epoch: to convert steps to epochs.
    """

    def __init__(self, run_dir: Path, metric: str, steps_per_epoch: int) -> None:
        self._spool = RunDirectory(run_dir).spool
        self._name = f"val/{metric}"
        self._steps_per_epoch = steps_per_epoch
        self._offset = 0
        self.points: list[tuple[int, float]] = []
        """Epoch, from 1, and value, in order."""

    def read(self) -> list[tuple[int, float]]:
        """Read the new events; returns all points."""
        for event, end in read_events(self._spool, self._offset):
            self._offset = end
            if event is None or event["e"] != "metrics" or self._name not in event["v"]:
                continue
            value = float(event["v"][self._name])
            if math.isfinite(value):
                self.points.append((math.ceil(event["step"] / self._steps_per_epoch), value))
        return self.points
