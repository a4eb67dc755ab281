"""Figures and pages of a run that has just finished."""

from __future__ import annotations

import logging
from pathlib import Path

from dl2pa.reporting.artifacts import load_run_data, make_artifacts
from dl2pa.reporting.assignment_figures import draw_assignment_figures
from dl2pa.training.finish import FinishedRun

log = logging.getLogger(__name__)


def report_run(finished: FinishedRun) -> list[tuple[Path, str]]:
    """Draw figures and pages into the run directory; a failure only logs a warning.

    Returns:
        Each file that was made, with its folder among the run's artifacts.
    """
    run, config, data = finished.run, finished.config, finished.data
    figures = draw_assignment_figures(run, finished.method, finished.assignment_updates, data.classes)
    try:
        name = config.tracking.run_name or finished.name
        ids = finished.run_uuid, finished.mlflow_run_id
        run_data = load_run_data(run, config, data, finished.result, name, finished.steps_per_epoch, ids)
        return make_artifacts(run, run_data, config, data, figures)
    except Exception as error:
        log.warning("no summary of the run: %s: %s", type(error).__name__, error)
        return [(path, run.pictures.name) for path in figures]
