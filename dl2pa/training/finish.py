"""End of a run: write the model and the result, report, end the tracking."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa.config import Config
from dl2pa.methods import Method
from dl2pa.model.saved import save_classifier
from dl2pa.osutil import write_json
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.description import NOTE_TAG, STOPPED_EARLY_TAG, describe_run
from dl2pa.training.calibrate import Calibration, add_to_predictions, calibration_results
from dl2pa.training.data import DataSplits
from dl2pa.training.record import record_model
from dl2pa.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedRun:
    """What a report of a finished run is made from.

    Attributes:
        name: name of the run in tracking, or of the configuration.
        result: content of `result.json`.
        method: the trained method, with its final assignment.
        assignment_updates: records of `matchings.jsonl`.
        run_uuid, mlflow_run_id: the run's identifiers in tracking.
    """

    run: RunDirectory
    config: Config
    data: DataSplits
    name: str
    result: dict[str, Any]
    method: Method
    assignment_updates: list[dict[str, Any]]
    steps_per_epoch: int
    run_uuid: str | None
    mlflow_run_id: str | None


Report = Callable[[FinishedRun], Sequence[tuple[Path, str]]]
"""Draw figures and pages into the run directory. Returns each file with its folder among the run's artifacts."""


def finish_run(
    trainer: Trainer,
    data: DataSplits,
    name: str,
    report: Report | None,
    calibration: Calibration | None = None,
) -> None:
    """Write the model and the result, record both, and end the tracking; rank 0 only.

    Args:
        calibration: None if no temperature was fitted.
    """
    run, tracker, config = trainer.run_dir, trainer.tracker, trainer.config
    temperature = None if calibration is None else calibration.temperature
    save_classifier(run.model, trainer.train_state.evaluated, config, data.classes, data.groups, temperature)
    result = summarize(trainer, len(data.classes)) | calibration_results(calibration)
    write_json(run.result, result)
    if calibration is not None:
        values = {f"val/{key}": value for key, value in calibration.metrics().items()}
        tracker.metrics(trainer.progress.global_step, values)
        add_to_predictions(run.predictions, calibration)
    for path in (run.validation, run.result):
        tracker.artifact(path)
    if run.matchings.exists():
        tracker.artifact(run.matchings)
    if trainer.stopped_early:
        tracker.tags({STOPPED_EARLY_TAG: f"epoch {result['epochs']}"})
    if config.tracking.enabled:
        if config.tracking.figures and report is not None:
            _report(trainer, data, name, result, report)
        command = run.attempts()[-1]["command"]
        tracker.tags({NOTE_TAG: describe_run(config, name, command, result)})
    record_model(tracker, run, config, data.val, result)
    tracker.finish("finished")
    result["mlflow_run_id"] = tracker.mlflow_run_id
    write_json(run.result, result)
    run.write_status(state="finished")


def _report(trainer: Trainer, data: DataSplits, name: str, result: dict[str, Any], report: Report) -> None:
    """Draw the report and record its files. A failure only logs a warning."""
    finished = FinishedRun(
        run=trainer.run_dir,
        config=trainer.config,
        data=data,
        name=trainer.config.tracking.run_name or name,
        result=result,
        method=trainer.train_state.model.method,
        assignment_updates=trainer.match_history.records(),
        steps_per_epoch=trainer.train_pipeline.steps_per_epoch,
        run_uuid=trainer.tracker.run_uuid,
        mlflow_run_id=trainer.tracker.mlflow_run_id,
    )
    try:
        for path, folder in report(finished):
            trainer.tracker.artifact(path, folder)
    except Exception as error:
        log.warning("the report could not be drawn: %s: %s", type(error).__name__, error)


def summarize(trainer: Trainer, num_classes: int) -> dict[str, Any]:
    """The run's result, as `train --json` prints it."""
    progress, config = trainer.progress, trainer.config
    last = progress.history[-1]
    return {
        "top1_last": last["top1"],
        "top1_best": max(h["top1"] for h in progress.history),
        "top5_last": last["top5"],
        "ece_last": last["ece"],
        **{key: value for key, value in last.items() if key.startswith("top1_")},
        "num_validated": last["num_validated"],
        "num_missing": last.get("num_missing", 0),
        "epoch_best": progress.accuracies()["epoch_best"],
        "epochs": progress.epoch,
        "steps": progress.global_step,
        "stopped_early": trainer.stopped_early,
        "world_size": trainer.world.size,
        "accumulate": trainer.train_state.accumulate,
        "labels_moved": progress.labels_moved,
        "images_per_second": trainer.images_seen / max(trainer.train_seconds, 1e-9)
        if trainer.images_seen
        else None,
        "bad_images": progress.bad_images,
        "run_dir": str(trainer.run_dir.root),
        "mlflow_run_id": trainer.tracker.mlflow_run_id,
        "method": config.method.name,
        "loss": config.loss,
        "assignment": config.assignment,
        "dim": config.model.embedding_dim,
        "num_classes": num_classes,
    }
