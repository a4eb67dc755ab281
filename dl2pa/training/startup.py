"""Time from the command to the first training step, by stage."""

from __future__ import annotations

import logging
import time

from dl2pa.process import command_began

log = logging.getLogger(__name__)


class StartUp:
    """Measures the stages between the start of the command and the first step."""

    def __init__(self) -> None:
        self._began = self._last = command_began()
        self.stages: dict[str, float] = {}

    def reached(self, stage: str) -> None:
        """End a stage: it lasted since the end of the previous one."""
        now = time.time()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._last
        self._last = now

    def first_step_done(self) -> dict[str, float]:
        """End and log the last stage; returns seconds by stage, with their sum as `total`."""
        self.reached("first step")
        split = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.stages.items())
        log.info("first step %.1f s after the command: %s", self._last - self._began, split)
        return {**self.stages, "total": self._last - self._began}
