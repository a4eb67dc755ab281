"""Record evaluations of a finished run: `RUN/evaluations/`, and the run's record in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.evaluation.interval import wilson_interval
from dl2pa.osutil import sha256_of, write_atomically, write_json
from dl2pa.ownership import is_owned
from dl2pa.records import read_record
from dl2pa.rundir import RunDirectory

if TYPE_CHECKING:
    from dl2pa.training.evaluate import Evaluation

_FIELDS = {"data_fingerprint": str, "options": dict, "model_sha256": str, "step": int, "metrics": dict}
_REMEDY = "Delete the file and repeat the evaluation."


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the data, and the settings that change the result.

    Attributes:
        name: name of the record, in which `ood/` and `retrieval/` are folders.
        root: folder of the data.
        fingerprint: of the data and its labels.
        options: settings by name.
    """

    name: str
    root: str
    fingerprint: str
    options: Mapping[str, Any]

    @property
    def prefix(self) -> str:
        """Prefix of the metrics in MLflow."""
        return self.name if "/" in self.name else f"eval/{self.name}"


@dataclass(frozen=True)
class Outcome:
    """Result of an evaluation.

    Attributes:
        metrics: numbers by name.
        details: further content of the record.
        pages: texts by file name, written to a folder with the name of the record.
        images, classes: size of the data.
    """

    metrics: dict[str, float]
    images: int
    classes: int
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    pages: dict[str, str] = field(default_factory=dict[str, str])


def metrics_of(result: Evaluation) -> dict[str, float]:
    """Metrics of a classification with the number of correct images and the 95 % interval of the accuracy."""
    correct = sum(result.class_correct)
    low, high = wilson_interval(correct, result.num_validated)
    return {**result.metrics(), "num_correct": correct, "top1_low": low, "top1_high": high}


def read_evaluation(file: Path) -> dict[str, Any] | None:
    """Read a record of ``Recorder``; None if there is none.

    Raises:
        DamagedFile: it is not such a record.
    """
    return read_record(file, _FIELDS, _FIELDS, _REMEDY)


class Recorder:
    """Record the evaluations of a run's final model.

    Args:
        run_dir: run directory of a finished run.
        config: of the run.
    """

    def __init__(self, run_dir: Path, config: Config) -> None:
        self._run, self._config = RunDirectory(run_dir), config
        if is_owned(self._run):
            remedy = "Wait until it ends, or give --checkpoint latest, which is not recorded."
            raise UserError("run", str(run_dir), "is being trained", remedy)
        self._digest = sha256_of(self._run.model)
        self._step = int(self._run.read_result().get("steps", 0))
        self._notes: list[str] = []

    def check(self, subject: Subject) -> None:
        """Refuse a name under which other data or settings are recorded.

        Raises:
            UserError: names the set; the record is damaged.
        """
        stored = self._read(subject)
        if stored is None:
            return
        file = self._run.evaluation_file(subject.name)
        if stored["data_fingerprint"] != subject.fingerprint:
            problem = f"is recorded with other images or labels in {file}"
        elif stored["options"] != dict(subject.options):
            problem = f"is recorded with other options ({json.dumps(stored['options'])}) in {file}"
        else:
            return
        remedy = "Give the images another name by --set NAME=DIR or --ood NAME=DIR, or delete that file."
        raise UserError("evaluation", subject.name, problem, remedy)

    def record(self, subject: Subject, outcome: Outcome) -> None:
        """Write the record, once per data, options and model, and append it to the run's record in MLflow."""
        stored = self._read(subject)
        if stored is None or (stored["model_sha256"], stored["step"]) != (self._digest, self._step):
            stored = self._write(subject, outcome)
        elif not outcome.metrics.keys() <= stored["metrics"].keys():  # written by an earlier version
            metrics = {**outcome.metrics, **stored["metrics"]}
            stored = self._write(subject, replace(outcome, metrics=metrics))
        self._append(subject, outcome, stored)

    def send(self) -> list[str]:
        """Send what was appended to the server of the run; return messages about what was not recorded or sent."""
        from dl2pa.tracking.append import is_tracked, send_appended
        from dl2pa.tracking.sync import recorded_server

        root = self._run.root
        if is_tracked(root):
            recorded = recorded_server(root, self._config.tracking.uri)
            problem = None if recorded is None else send_appended(root, recorded)
            if problem is not None:
                self._notes.append(f"not sent to MLflow ({problem}); `dl2pa sync {root}` sends it")
        return self._notes

    def _read(self, subject: Subject) -> dict[str, Any] | None:
        return read_evaluation(self._run.evaluation_file(subject.name))

    def _write(self, subject: Subject, outcome: Outcome) -> dict[str, Any]:
        content: dict[str, Any] = {
            "name": subject.name,
            "path": subject.root,
            "data_fingerprint": subject.fingerprint,
            "options": dict(subject.options),
            "model_sha256": self._digest,
            "step": self._step,
            "metrics": outcome.metrics,
            **outcome.details,
        }
        file = self._run.evaluation_file(subject.name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            for name, text in outcome.pages.items():
                file.with_suffix("").mkdir(exist_ok=True)
                write_atomically(file.with_suffix("") / name, text)
            write_json(file, content)  # last: the record is complete
        except OSError as error:
            self._notes.append(f"not recorded: {file} cannot be written ({error.strerror or error})")
        return content

    def _append(self, subject: Subject, outcome: Outcome, stored: Mapping[str, Any]) -> None:
        from dl2pa.tracking.append import Results, append_results, is_tracked
        from dl2pa.tracking.filelock import Busy

        file = self._run.evaluation_file(subject.name)
        if not file.is_file() or not is_tracked(self._run.root):
            return
        relative = file.relative_to(self._run.root)
        pages = [relative.with_suffix("").as_posix()] if outcome.pages else []
        profile = {"images": outcome.images, "classes": outcome.classes}
        results = Results(
            step=self._step,
            metrics={f"{subject.prefix}/{key}": value for key, value in stored["metrics"].items()},
            tags={f"dl2pa.{subject.prefix}.data": subject.fingerprint},
            datasets=[
                {
                    "name": f"{subject.name} evaluation",
                    "digest": subject.fingerprint[:36],
                    "context": "evaluation",
                    "source": json.dumps({"uri": subject.root}),
                    "profile": json.dumps(profile),
                }
            ],
            artifacts=[relative.as_posix(), *pages],
            folder=relative.parent.as_posix(),
        )
        try:
            append_results(self._run.root, results)
        except Busy:
            self._notes.append(f"{subject.name}: not added to the run's events; repeat the command later")
        except OSError as error:
            self._notes.append(f"{subject.name}: not added to the run's events ({error})")


def classification_outcome(result: Evaluation, classes: tuple[str, ...], title: str) -> Outcome:
    """Outcome of a classification: metrics, counts per class, confusion matrix and their pages.

    Args:
        classes: names of the classes that were chosen from.
        title: title of the pages.
    """
    import numpy as np

    from dl2pa.reporting import pages
    from dl2pa.reporting.class_metrics import class_rows, confuse, neighbors_together

    predictions = result.predictions
    confusion = confuse(predictions.targets, predictions.predicted, len(classes))
    rows = class_rows(predictions, classes)
    order = neighbors_together(confusion) if len(classes) > 1 else np.arange(len(classes))
    return Outcome(
        metrics=metrics_of(result),
        images=result.num_validated,
        classes=len(classes),
        details={
            "classes": list(classes),
            "class_correct": result.class_correct,
            "class_total": result.class_total,
            "confusion": {
                "true": confusion.true.tolist(),
                "predicted": confusion.predicted.tolist(),
                "count": confusion.count.tolist(),
            },
        },
        pages={
            "per_class.csv": pages.classes_csv(rows),
            "per_class.html": pages.classes_page(rows, f"{title}: classes"),
            "confusion.html": pages.confusion_page(confusion, order, classes, f"{title}: confusion matrix"),
        },
    )
