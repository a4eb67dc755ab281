"""Progress display: a progress bar on a terminal, lines in the log."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger(__name__)


class Display:
    """Rank 0's progress on standard error.

    Args:
        enabled: whether this rank displays progress.
    """

    def __init__(self, enabled: bool, steps_per_epoch: int, epochs: int) -> None:
        self._enabled = enabled
        self._steps = steps_per_epoch
        self._epochs = epochs
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps_per_epoch, unit="step", leave=False, file=sys.__stderr__)

    def step(self, epoch: int, step: int, global_step: int) -> None:
        if self._bar is not None:
            self._bar.set_description_str(f"epoch {epoch + 1}/{self._epochs}", refresh=False)
            self._bar.n = step
            self._bar.refresh() if step == self._steps else self._bar.update(0)

    def logged(self, loss: float, images_per_second: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:,.0f} images/s")

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
            f"top-5 {entry['top5']:.2f} %, ECE {entry['ece']:.2f} % on {entry['num_validated']} images"
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
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _info(self, text: str) -> None:
        if self._enabled:
            log.info(text)
