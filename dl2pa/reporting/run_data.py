"""Data of one finished run that its report is made from, its published results and its checks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dl2pa.config.published import PublishedMatch, matching_cells, published_file
from dl2pa.reporting.class_metrics import ClassRow, Confusion, class_rows, confuse
from dl2pa.reporting.run_plots import Curve, best_point
from dl2pa.reporting.runs import changed_between_attempts
from dl2pa.tracking.spool import read_events
from dl2pa.training.data import class_counts
from dl2pa.training.evaluate import Predictions
from dl2pa.training.finish import FinishedRun

_ABOVE_CHANCE = 10.0
"""Top-1 accuracy above chance level, in points, that is enough with few classes; with many, twice chance level is."""


@dataclass(frozen=True)
class RunData(FinishedRun):
    """A finished run with what its run directory contains.

    Attributes:
        predictions: for the readable validation images.
        attempts: environment of each attempt, first to last.
        points: (step, value) per metric, ordered by step.
        started, ended: seconds since 1970.
        changed: configuration keys that changed between attempts.
    """

    predictions: Predictions
    attempts: Sequence[Mapping[str, Any]]
    points: Mapping[str, Curve]
    started: float
    ended: float
    changed: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.classes

    @property
    def environment(self) -> Mapping[str, Any]:
        """Environment of the last attempt."""
        return self.attempts[-1] if self.attempts else {}

    @cached_property
    def confusion(self) -> Confusion:
        return confuse(self.predictions.targets, self.predictions.predicted, len(self.classes))

    @cached_property
    def class_rows(self) -> list[ClassRow]:
        counts = class_counts(self.data.train)
        trained = None if counts is None else counts.tolist()
        return class_rows(self.predictions, self.classes, trained, self.data.groups)

    @property
    def best_epoch(self) -> int:
        """Epoch of the highest top-1 accuracy, from 1; 0 without validation points.

        The points may include validations of an attempt that was killed and that the next one has repeated.
        """
        if (known := self.result.get("epoch_best")) is not None:  # early results do not have it
            return int(known)
        curve = self.points.get("val/top1", ())
        return math.ceil(best_point(curve)[0] / self.steps_per_epoch) if curve else 0

    def values(self, name: str, after: int = 0) -> list[float]:
        """Finite values of a metric after a step, ordered by step."""
        return [value for step, value in self.points.get(name, ()) if step > after and math.isfinite(value)]

    @property
    def warmup_steps(self) -> int:
        """Steps that trained the learned classifier of the warm-up, which has a loss of its own."""
        is_dynamic = self.config.assignment == "dynamic"
        return self.config.method.match.warmup_epochs * self.steps_per_epoch if is_dynamic else 0


def load_run_data(finished: FinishedRun) -> RunData:
    """Read the predictions, the metrics and the environment of a run.

    Raises:
        OSError: the predictions file is missing.
    """
    run = finished.run
    points: dict[str, list[tuple[float, float]]] = {}
    started = now = time.time()
    for event in (entry.event for entry in read_events(run.spool) if entry.event is not None):
        started = min(started, event["t"] / 1000.0)
        if event["e"] == "metrics":
            for name, value in event["v"].items():
                points.setdefault(name, []).append((event["step"], float(value)))
    return RunData(
        **vars(finished),
        predictions=Predictions.load(run.predictions),
        attempts=run.attempts(),
        points={name: sorted(curve) for name, curve in points.items()},
        started=started,
        ended=now,
        changed=changed_between_attempts(run.spool, finished.config),
    )


def published_results(run_data: RunData) -> list[PublishedMatch]:
    """Find the published results of the run's recipe; none if its configuration changed or their file is missing."""
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
    checks = (_check_learning, _check_classes, _check_machine, _check_record)
    return [result for check in checks for result in check(run_data)]


def _check_learning(run_data: RunData) -> Iterator[Check]:
    warmup = run_data.warmup_steps
    # A logged loss is the mean since the log point before.
    after = warmup + run_data.config.train.log_every_steps - 1 if warmup else 0
    result, loss = run_data.result, run_data.values("train/loss", after)
    top1 = result["top1_last"]
    if len(loss) > 1:
        level, verb = ("good", "fell") if loss[-1] < loss[0] else ("bad", "did not fall")
        yield Check(level, f"The training loss {verb}: {loss[0]:.4g} first, {loss[-1]:.4g} last.")
    chance = 100.0 / len(run_data.classes)
    if top1 < chance + min(chance, _ABOVE_CHANCE):
        yield Check("bad", f"Top-1 accuracy {top1:.2f} % is close to chance level ({chance:.3g} %).")
    lost = result["top1_best"] - top1
    if lost > 0.5:
        text = f"The last validation is {lost:.2f} points below the best, at epoch {run_data.best_epoch}."
        yield Check("note", text)
    moved = result.get("labels_moved") or []
    if moved:
        text = f"{moved[-1]:,} labels moved at the last of {len(moved):,} assignment updates"
        level, verb = ("note", "had not") if moved[-1] > 0 else ("good", "had")
        yield Check(level, f"{text}: the assignment {verb} converged.")


def _check_classes(run_data: RunData) -> Iterator[Check]:
    accuracies = [row.top1 for row in run_data.class_rows if row.top1 is not None]
    never = accuracies.count(0.0)
    if never:
        text = f"{never:,} of {len(accuracies):,} classes have no correct prediction."
        yield Check("bad" if never > 0.05 * len(run_data.classes) else "note", text)
    calibrated = run_data.result.get("ece_calibrated")
    kind, ece = ("Raw", run_data.result["ece_last"]) if calibrated is None else ("Calibrated", calibrated)
    if ece > 10:
        text = f"{kind} confidence and accuracy differ by {ece:.0f} points on average: do not use it as a probability."
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
