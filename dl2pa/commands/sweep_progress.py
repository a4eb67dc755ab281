"""Progress of the runs of a sweep on this machine: one line per running run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dl2pa.commands.live import LiveBlock, can_redraw
from dl2pa.commands.output import note
from dl2pa.runplan import RunPlan
from dl2pa.training.display import duration

_TERMINAL_S = 1.0
_LOG_S = 60.0


class SweepProgress:
    """Lines of the running runs: on a terminal a block that is drawn again, in a log one line per run and minute.

    Args:
        block: where the lines are drawn; None for a log.
    """

    def __init__(
        self, plans: Sequence[RunPlan], block: LiveBlock | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plans = plans
        self._block = block
        self._clock = clock
        self._running: dict[int, Any] = {}
        """Index of each running run, with the step of its last line in the log."""
        self._drawn = clock()

    def started(self, number: int) -> None:
        """Print that a run starts."""
        plan = self._plans[number]
        self._note(f"[{number + 1}/{len(self._plans)}] starts: {plan.title}, {plan.run_dir}")
        self._running[number] = self._plans[number].directory.status().get("step")
        self._draw()

    def ended(self, number: int, text: str) -> None:
        """Print the outcome of a run."""
        self._running.pop(number, None)
        self._note(f"[{number + 1}/{len(self._plans)}] {text}")
        self._draw()

    def poll(self) -> None:
        """Show the progress if it is time to."""
        if self._clock() - self._drawn >= (_LOG_S if self._block is None else _TERMINAL_S):
            self._drawn = self._clock()
            self._draw()
            if self._block is None:
                self._log()

    def close(self) -> None:
        """Remove the lines from the terminal."""
        self._running.clear()
        self._draw()

    def _note(self, text: str) -> None:
        if self._block is not None:
            self._block.show([])
        note(text)

    def _draw(self) -> None:
        if self._block is not None:
            lines = [self._line(number, self._status(number)) for number in sorted(self._running)]
            self._block.show(lines)

    def _log(self) -> None:
        for number in sorted(self._running):
            status = self._status(number)
            if status.get("step") != self._running[number]:
                self._running[number] = status.get("step")
                note(self._line(number, status))

    def _status(self, number: int) -> dict[str, Any]:
        return self._plans[number].directory.status()

    def _line(self, number: int, status: Mapping[str, Any]) -> str:
        return f"[{number + 1}/{len(self._plans)}] {self._plans[number].title}: {progress_of(status)}"


def block_on_terminal() -> LiveBlock | None:
    """Block on standard error; None if that is not a terminal."""
    terminal = sys.__stderr__
    return LiveBlock(terminal) if terminal is not None and can_redraw(terminal) else None


def progress_of(status: Mapping[str, Any]) -> str:
    """Progress of a running run in one line, from its status."""
    if status.get("state") not in ("running", "stopping") or status.get("loss") is None:
        return "starting"
    parts = [f"epoch {int(status['epoch']) + 1}/{status['epochs']}"] if "epochs" in status else []
    parts.append(f"step {status['step']}/{status['total_steps']}")
    parts.append(f"loss {status['loss']:.4f}, {status['images_per_second']:,.0f} images/s")
    if status.get("eta_seconds") is not None:
        parts.append(f"ETA {duration(status['eta_seconds'])}")
    if status.get("top1") is not None:
        parts.append(f"top-1 {status['top1']:.2f} %")
    return ", ".join(parts)
