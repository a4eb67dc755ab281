"""Data of one finished run that its artifacts are made from, its published results and its checks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dl2pa.config import Config
from dl2pa.config.published import PublishedMatch, matching_cells, published_file
from dl2pa.reporting.class_metrics import Confusion, Labels, confuse
from dl2pa.reporting.run_plots import Curve, best_point


@dataclass(frozen=True)
class RunData:
    """One finished run.

    Attributes:
        result: as `train --json` prints it.
        attempts: environment of each attempt, first to last.
        points: (step, value) per metric.
        samples, targets, predicted, confidence, in_top5: per readable validation image, [N]: index in the data set and
            prediction.
        trained: training images per class, if known.
        images: number of training and of validation images.
        started, ended: seconds since 1970.
        changed: configuration keys that changed between attempts.
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
        """Environment of the last attempt."""
        return self.attempts[-1] if self.attempts else {}

    @property
    def confusion(self) -> Confusion:
        return confuse(self.targets, self.predicted, len(self.classes))

    @property
    def best_epoch(self) -> float:
        """Epoch of the highest top-1 accuracy; 0 without validation points."""
        curve = self.points.get("val/top1", ())
        return best_point(curve)[0] / self.steps_per_epoch if curve else 0.0

    def values(self, name: str) -> list[float]:
        """Finite values of a metric, ordered by step."""
        return [value for _, value in sorted(self.points.get(name, ())) if math.isfinite(value)]


def published_results(run_data: RunData) -> list[PublishedMatch]:
    """Find the published results of the run's recipe; none if its configuration changed or there is no file of them."""
    if run_data.changed or not published_file().is_file():
        return []
    result = run_data.result
    return matching_cells(run_data.config, int(result["epochs"]), int(result["num_validated"]))


@dataclass(frozen=True)
class Check:
    """Outcome of one check of a run."""

    level: Literal["good", "note", "bad"]
    text: str


def check_run(run_data: RunData) -> list[Check]:
    """Check the course of training, the machine and the record by fixed thresholds."""
    return [
        *_check_learning(run_data),
        *_check_classes(run_data),
        *_check_machine(run_data),
        *_check_record(run_data),
    ]


def _check_learning(run_data: RunData) -> Iterator[Check]:
    result, loss = run_data.result, run_data.values("train/loss")
    top1 = result["top1_last"]
    if len(loss) > 1:
        fell = loss[-1] < loss[0]
        verb = "fell" if fell else "did not fall"
        yield Check(
            "good" if fell else "bad", f"The training loss {verb}: {loss[0]:.4g} first, {loss[-1]:.4g} last."
        )
    chance = 100.0 / len(run_data.classes)
    if top1 < 2 * chance:
        yield Check("bad", f"Top-1 accuracy {top1:.2f} % is less than twice chance level ({chance:.3g} %).")
    lost = result["top1_best"] - top1
    if lost > 0.5:
        text = f"The last validation is {lost:.2f} points below the best, at epoch {run_data.best_epoch:.4g}."
        yield Check("note", text)
    moved = result.get("labels_moved") or []
    if moved:
        text = f"{moved[-1]:,} labels moved at the last of {len(moved):,} assignment updates"
        if moved[-1] > 0:
            yield Check("note", f"{text}: the assignment had not converged.")
        else:
            yield Check("good", f"{text}: the assignment had converged.")


def _check_classes(run_data: RunData) -> Iterator[Check]:
    classes = len(run_data.classes)
    images = np.bincount(run_data.targets, minlength=classes)
    hits = np.bincount(run_data.targets[run_data.targets == run_data.predicted], minlength=classes)
    never = int(((hits == 0) & (images > 0)).sum())
    if never:
        text = f"{never:,} of {int((images > 0).sum()):,} classes have no correct prediction."
        yield Check("bad" if never > 0.05 * classes else "note", text)
    ece = run_data.result["ece_last"]
    if ece > 10:
        text = (
            f"Confidence and accuracy differ by {ece:.0f} points on average: do not use it as a probability."
        )
        yield Check("note", text)


def _check_machine(run_data: RunData) -> Iterator[Check]:
    waited = run_data.values("time/data_wait_share")
    if waited:
        share = 100.0 * statistics.median(waited)
        text = f"Training waited for data {share:.1f} % of the time (median over the log points)."
        yield Check("note" if share > 5 else "good", text)
    bad = run_data.result.get("bad_images") or []
    if bad:
        yield Check("note", f"{len(bad):,} training images could not be read and were replaced.")


def _check_record(run_data: RunData) -> Iterator[Check]:
    attempts = len(run_data.attempts)
    if attempts > 1:
        yield Check("note", f"The run took {attempts} attempts; each resumed from the last checkpoint.")
    if run_data.changed:
        yield Check("bad", f"The configuration changed between attempts: {', '.join(run_data.changed)}.")
    if run_data.environment.get("git_dirty"):
        text = (
            "The code had uncommitted changes; those of tracked files are in the artifacts, folder `code/`."
        )
        yield Check("note", text)
