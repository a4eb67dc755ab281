"""Seconds from the command to the first step, by what they went into."""

from __future__ import annotations

import logging
import time

from dl2pa.process import command_began

log = logging.getLogger(__name__)


class StartUp:
    """Counts from the command on; each stage takes what has passed since the one before."""

    def __init__(self) -> None:
        self._began = self._last = command_began()
        self.stages: dict[str, float] = {}

    def reached(self, stage: str) -> None:
        """A stage is over."""
        now = time.time()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._last
        self._last = now

    def first_step_done(self) -> dict[str, float]:
        """The last stage is over: say so; seconds by stage, with their sum as `total`."""
        self.reached("first step")
        split = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.stages.items())
        log.info("first step %.1f s after the command: %s", self._last - self._began, split)
        return {**self.stages, "total": self._last - self._began}
