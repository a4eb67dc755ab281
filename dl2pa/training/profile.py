"""Profile some steps of a run with torch.profiler: a trace and a table."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dl2pa import fence
from dl2pa.training.distributed import World

log = logging.getLogger(__name__)

_SKIPPED = 10
"""Steps before profiling starts, in which libraries choose kernels and memory is allocated."""
_ROWS = 40


class StepProfile:
    """Profiles `steps` steps of an attempt on rank 0, from the eleventh on; does nothing if `steps` is 0.

    Writes ``trace.json`` (for chrome://tracing or Perfetto) and ``table.txt`` to `folder`. A failure only logs a
    warning.
    """

    def __init__(self, steps: int, folder: Path, world: World) -> None:
        self._left = _SKIPPED + steps if steps and world.is_main else 0
        self._steps = steps
        self._folder = folder
        self._gpu = world.device.type == "cuda"
        self._profiler: Any = None

    def before_step(self) -> None:
        """Call before the next batch is requested."""
        if self._left == 0:
            return
        if self._left == self._steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])]
            self._profiler = profile(activities=activities, record_shapes=True)
            self._guard(self._profiler.start)
        self._left -= 1

    def after_step(self) -> list[Path]:
        """Call after a step; returns the files if this was the last profiled step."""
        if self._left or self._profiler is None:
            return []
        return self.finish()

    def finish(self) -> list[Path]:
        """End profiling, also before all steps are done, and write the files."""
        profiler, self._profiler, self._left = self._profiler, None, 0
        return [] if profiler is None else self._guard(lambda: self._write(profiler)) or []

    def _write(self, profiler: Any) -> list[Path]:
        if self._gpu:
            torch.cuda.synchronize()
        profiler.stop()
        fence.check(self._folder)
        self._folder.mkdir(exist_ok=True)
        trace, table = self._folder / "trace.json", self._folder / "table.txt"
        profiler.export_chrome_trace(str(trace))
        key = "self_device_time_total" if self._gpu else "self_cpu_time_total"
        rows = profiler.key_averages().table(sort_by=key, row_limit=_ROWS)
        table.write_text(f"{self._steps} steps\n{rows}\n", encoding="utf-8")
        log.info("profile of %d steps: %s", self._steps, self._folder)
        return [trace, table]

    def _guard(self, action: Any) -> Any:
        try:
            return action()
        except Exception as error:
            log.warning("no profile (%s: %s); training continues", type(error).__name__, error)
            self._profiler, self._left = None, 0
            return None
