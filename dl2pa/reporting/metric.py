"""Metrics that runs are compared by: fields of `result.json`, and figures of recorded evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dl2pa.errors import UserError
from dl2pa.evaluation.record import read_evaluation
from dl2pa.reporting.runs import Run
from dl2pa.rundir import RunDirectory

RESULTS = (
    *("top1_last", "top1_best", "top1_head", "top1_medium", "top1_tail"),
    *("ece_last", "ece_calibrated", "nll", "nll_calibrated"),
)
"""Fields of `result.json` that can be compared."""
_FOLDERS = {"eval": "", "ood": "ood/", "retrieval": "retrieval/"}


class Metric:
    """A number of each run of one table.

    Args:
        name: one of `RESULTS`, or the name of an evaluation's metric in MLflow, such as
            `retrieval/validation/recall_at_1`.

    Raises:
        UserError: not such a name (``--metric``).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._first: tuple[Path, Any] | None = None
        kind, _, rest = name.partition("/")
        self._set, _, self._key = rest.partition("/")
        self._folder = _FOLDERS.get(kind)
        if name not in RESULTS and (self._folder is None or not self._set or not self._key):
            remedy = (
                f"Use one of {', '.join(RESULTS)}, or eval/SET/METRIC, ood/SET/METRIC, retrieval/SET/METRIC."
            )
            raise UserError("--metric", name, "is not the name of a metric", remedy)

    def of(self, run: Run) -> float | None:
        """Value of a run; None if it has none.

        Raises:
            UserError: the evaluation used other data or options than that of an earlier run, or the run was trained
                further after it (``--metric``); its record is damaged.
        """
        if self._folder is None:
            return getattr(run.result, self.name)
        file = RunDirectory(run.path).evaluation_file(f"{self._folder}{self._set}")
        record = read_evaluation(file)
        value = None if record is None else record["metrics"].get(self._key)
        if record is None or isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if record["step"] != run.result.steps:
            problem = (
                f"was measured at step {record['step']:,} of {run.path}, which ended at {run.result.steps:,}"
            )
            raise UserError(
                "--metric", self.name, problem, "Repeat the `dl2pa evaluate` command of this run."
            )
        subject = record["data_fingerprint"], record["options"]
        self._first = self._first or (file, subject)
        if self._first[1] != subject:
            problem = f"was measured on other images or with other options in {file} than in {self._first[0]}"
            raise UserError("--metric", self.name, problem, "Evaluate all runs in the same way.")
        return float(value)
