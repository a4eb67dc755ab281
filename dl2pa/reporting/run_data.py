"""A run as its artifacts tell it: everything they need, read once; and whether it went well."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dl2pa.config import Config
from dl2pa.config.identity import Length
from dl2pa.config.published import Cell, published_file
from dl2pa.reporting.class_metrics import Confusion, Labels, confuse
from dl2pa.reporting.compare import compare
from dl2pa.reporting.run_plots import Curve
from dl2pa.reporting.runs import Result, Run


@dataclass(frozen=True)
class RunData:
    """One finished run.

    Attributes:
        result: as `train --json` prints it.
        attempts: the environment of each, the first first.
        points: (step, value) of each metric by name.
        samples, targets, predicted, confidence, in_top5: of each validation image that could be read, [N]: its place in
            the set, and what the model said.
        trained: training images of each class, where known.
        started, ended: seconds since 1970.
        changed: keys of the configuration that an attempt changed midway.
    """

    name: str
    run_dir: Path
    config: Config
    result: Mapping[str, Any]
    attempts: Sequence[Mapping[str, Any]]
    points: Mapping[str, Curve]
    classes: Sequence[str]
    groups: Sequence[str] | None
    trained: Sequence[int] | None
    samples: Labels
    targets: Labels
    predicted: Labels
    confidence: NDArray[np.float64]
    in_top5: NDArray[np.bool_]
    steps_per_epoch: int
    images: tuple[int, int]
    fingerprint: str
    started: float
    ended: float
    run_uuid: str | None
    run_id: str | None
    changed: tuple[str, ...] = ()

    @property
    def environment(self) -> Mapping[str, Any]:
        """Of the last attempt."""
        return self.attempts[-1] if self.attempts else {}

    @property
    def confusion(self) -> Confusion:
        return confuse(self.targets, self.predicted, len(self.classes))

    def values(self, name: str) -> list[float]:
        """A metric's finite values in the order of the steps."""
        return [value for _, value in sorted(self.points.get(name, ())) if math.isfinite(value)]


@dataclass(frozen=True)
class Beside:
    """A published figure of the run's own configuration, and how long the run is beside it."""

    cell: Cell
    length: Length


def published_beside(run_data: RunData) -> list[Beside]:
    """The published figures whose configuration is the run's; none where there is no file of them."""
    file = published_file()
    if not file.is_file():
        return []
    run = Run(
        *(run_data.run_dir, run_data.config, Result.model_validate(dict(run_data.result)), run_data.ended),
        *(dict(run_data.environment), run_data.changed),
    )
    tables = compare([run], file).tables
    return [Beside(line.cell, e.length) for table in tables for line in table.lines for e in line.entries]


@dataclass(frozen=True)
class Finding:
    """One thing to know about how the run went."""

    kind: Literal["good", "note", "bad"]
    text: str


def findings(run_data: RunData) -> list[Finding]:
    """What went well and what did not, by simple rules whose limits are named in the text."""
    return [*_of_learning(run_data), *_of_machine(run_data), *_of_record(run_data)]


def _of_learning(run_data: RunData) -> list[Finding]:
    found: list[Finding] = []
    loss, top1 = run_data.values("train/loss"), run_data.result["top1_last"]
    if len(loss) > 1:
        fell = loss[-1] < loss[0]
        verb = "fell" if fell else "did not fall"
        text = f"The training loss {verb}: {loss[0]:.4g} at first, {loss[-1]:.4g} at last."
        found.append(Finding("good" if fell else "bad", text))
    chance = 100.0 / len(run_data.classes)
    if top1 < 2 * chance:
        found.append(Finding("bad", f"Top-1 {top1:.2f} % is hardly better than chance ({chance:.3g} %)."))
    lost = run_data.result["top1_best"] - top1
    if lost > 0.5:
        curve = run_data.points.get("val/top1", ())
        step = max(curve, key=lambda point: point[1])[0] if curve else 0
        epoch = step / run_data.steps_per_epoch
        text = f"The last validation is {lost:.2f} points below the best, at epoch {epoch:.4g}."
        found.append(Finding("note", text))
    images = np.bincount(run_data.targets, minlength=len(run_data.classes))
    hits = np.bincount(
        run_data.targets[run_data.targets == run_data.predicted], minlength=len(run_data.classes)
    )
    never = int(((hits == 0) & (images > 0)).sum())
    if never:
        text = f"{never:,} of {int((images > 0).sum()):,} classes were never recognized."
        found.append(Finding("bad" if never > 0.05 * len(images) else "note", text))
    ece = run_data.result["ece_last"]
    if ece > 10:
        text = f"Confidence is {ece:.0f} points off accuracy on average: rank by it, do not read it as a probability."
        found.append(Finding("note", text))
    moved = run_data.result.get("labels_moved") or []
    if moved:
        still = moved[-1] > 0
        text = f"{moved[-1]:,} labels moved at the last of {len(moved):,} matchings" + (
            ": the assignment had not settled." if still else ": the assignment had settled."
        )
        found.append(Finding("note" if still else "good", text))
    return found


def _of_machine(run_data: RunData) -> list[Finding]:
    found: list[Finding] = []
    waited = run_data.values("time/data_wait_share")
    if waited:
        share = 100.0 * statistics.median(waited)
        text = f"Training waited for data {share:.1f} % of the time (median over the log points)."
        found.append(Finding("note" if share > 5 else "good", text))
    bad = run_data.result.get("bad_images") or []
    if bad:
        found.append(Finding("note", f"{len(bad):,} training images could not be read and were replaced."))
    return found


def _of_record(run_data: RunData) -> list[Finding]:
    found: list[Finding] = []
    if len(run_data.attempts) > 1:
        found.append(
            Finding(
                "note", f"It took {len(run_data.attempts)} attempts; each went on where the last one saved."
            )
        )
    if run_data.changed:
        found.append(Finding("bad", f"The configuration changed midway: {', '.join(run_data.changed)}."))
    if run_data.environment.get("git_dirty"):
        text = "The code had changes that no commit holds; tracked files' are among the artifacts in `code/`."
        found.append(Finding("note", text))
    return found
