"""Progress display: a progress bar on a terminal, lines in the log."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_REDRAW_S = 0.1
_IN_BAR = "dl2pa_in_bar"
"""Attribute of a log record whose content the progress bar shows."""


class RemainingTime:
    """Remaining time of a run: remaining steps times the wall-clock time per step, which includes validations.

    Args:
        total_steps: steps of the run.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def estimate(self, step: int, seconds_per_step: float) -> float:
        """Seconds left after `step` steps of the run.

        Args:
            seconds_per_step: measured time of a step without validations, used until two estimates were made.
        """
        now = self._clock()
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step > first_step:
            seconds_per_step = (now - first_time) / (step - first_step)
        return max(0, self._total_steps - step) * seconds_per_step


def duration(seconds: float) -> str:
    """Format a duration as H:MM:SS."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class _AboveBar(logging.Handler):
    """Writes log lines of another handler above the progress bar, which is drawn again below them."""

    def __init__(self, handler: logging.Handler, bar: Any) -> None:
        super().__init__(handler.level)
        self.handler = handler
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, _IN_BAR):
            with self._bar.external_write_mode(file=sys.__stderr__):
                self.handler.handle(record)


class Display:
    """Rank 0's progress on standard error.

    Args:
        enabled: whether this rank displays progress.
        total_steps: steps of the run.
    """

    def __init__(self, enabled: bool, steps_per_epoch: int, epochs: int, total_steps: int) -> None:
        self._enabled = enabled
        self._steps = steps_per_epoch
        self._epochs = epochs
        self._total_steps = total_steps
        self._bar: Any = None
        self._drawn = 0.0
        if enabled and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps_per_epoch,
                leave=False,
                delay=1e-9,  # drawn at the first step: an error before that would be printed behind it
                file=sys.__stderr__,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
            self._redirect_log()

    def _redirect_log(self) -> None:
        """Write the log lines for the terminal above the bar; log files stay as they are."""
        root = logging.getLogger()
        for handler in list(root.handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                root.removeHandler(handler)
                root.addHandler(_AboveBar(handler, self._bar))

    def step(self, epoch: int, step: int, global_step: int) -> None:
        if self._bar is None:
            return
        now = time.monotonic()
        if step == self._steps or now - self._drawn >= _REDRAW_S:
            self._drawn = now
            self._bar.set_description_str(f"epoch {epoch + 1}/{self._epochs}", refresh=False)
            self._bar.n = step
            self._bar.refresh()

    def logged(
        self, epoch: int, step: int, loss: float, rate: float, images_per_second: float, seconds_left: float
    ) -> None:
        """Show the figures of a log interval: one line in the log, on a terminal beside the bar.

        Args:
            epoch: 0-based epoch.
            step: steps done in the run.
            rate: learning rate.
            seconds_left: estimated time to the end of the run.
        """
        figures = (
            f"loss {loss:.4f}, lr {rate:.3g}, {images_per_second:,.0f} images/s, ETA {duration(seconds_left)}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
        if self._enabled:
            place = f"epoch {epoch + 1}/{self._epochs}, step {step}/{self._total_steps}"
            log.info("%s: %s", place, figures, extra={_IN_BAR: True})

    def evaluating(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"validating {done}/{total}")

    def assignment_updated(self, global_step: int, moved: int, own_cosine: float) -> None:
        self._info(
            f"step {global_step}: assignment update moved {moved} label(s), mean cosine to own prototype "
            f"{own_cosine:.3f}"
        )

    def validated(self, entry: dict[str, Any]) -> None:
        self._info(
            f"epoch {entry['epoch']}/{self._epochs}, step {entry['step']}: top-1 {entry['top1']:.2f} %, "
            f"top-5 {entry['top5']:.2f} %, raw ECE {entry['ece']:.2f} % on {entry['num_validated']} images"
            + (f" ({missing} unreadable images skipped)" if (missing := entry.get("num_missing")) else "")
            + "".join(
                f", {k.removeprefix('top1_')} {v:.2f} %" for k, v in entry.items() if k.startswith("top1_")
            )
        )

    def stopped_early(self, history: list[dict[str, Any]], best: dict[str, float]) -> None:
        epoch = next(entry["epoch"] for entry in history if entry["step"] == best["step"])
        self._info(
            f"stopped early after epoch {history[-1]['epoch']} (train.patience): the best top-1 is "
            f"{best['top1']:.2f} %, of epoch {epoch}"
        )

    def close(self) -> None:
        """Remove the bar and write log lines directly again; idempotent."""
        if self._bar is None:
            return
        root = logging.getLogger()
        for handler in list(root.handlers):
            if isinstance(handler, _AboveBar):
                root.removeHandler(handler)
                root.addHandler(handler.handler)
        self._bar.close()
        self._bar = None

    def _info(self, text: str) -> None:
        if self._enabled:
            log.info(text)
