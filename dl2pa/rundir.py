"""Paths and small files of a run directory. No other module spells the name of a file in it."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dl2pa.container import in_container
from dl2pa.errors import UserError
from dl2pa.osutil import full_disk, try_to_write, write_json
from dl2pa.records import DamagedFile, Fields, check_record, read_record

log = logging.getLogger(__name__)

CHECKPOINT_STATE = "state.pt"
"""File of a checkpoint that contains the state."""

CHECKPOINT_MARKER = "COMPLETE"
"""File that is written last: a checkpoint without it is incomplete."""

CHECKPOINT_BEST = "best.json"
"""File among the checkpoints with the step of the best one."""

CHECKPOINT_LATEST = "latest"
"""File in the run directory with the folder name of the latest checkpoint."""

MODEL = "model.safetensors"
"""File of a run directory or an export that contains the final model."""

ATTEMPT_LINE = "attempt "
"""First words of the message with which each attempt begins in the log of a rank; the number follows."""

DAMAGED = "damaged"
"""State of a run whose status cannot be read."""

_STATUS: Fields = {
    **dict.fromkeys(("state", "error", "phase", "fingerprint"), str),
    **dict.fromkeys(("attempt", "step", "total_steps", "epochs", "pid", "epoch_last", "epoch_best"), int),
    **dict.fromkeys(("epoch", "images_per_second", "top1", "top1_best", "loss", "updated"), float),
    **dict.fromkeys(("lr", "eta_seconds", "gpu_percent", "started", "attempt_started"), float),
    "startup_s": dict,
}
_ATTEMPT: Fields = {
    **dict.fromkeys(("data_fingerprint", "data_classes", "command", "git_commit", "device", "dl2pa"), str),
    **dict.fromkeys(("attempt", "world_size"), int),
}
_RESULT: Fields = {
    **dict.fromkeys(("top1_last", "top1_best", "top5_last", "ece_last", "images_per_second"), float),
    **dict.fromkeys(("ece_calibrated", "nll", "nll_calibrated", "temperature"), float),
    **dict.fromkeys(
        ("epochs", "epoch_best", "steps", "num_validated", "num_classes", "num_calibration"), int
    ),
    **dict.fromkeys(("world_size", "dim"), int),
    **dict.fromkeys(("run_dir", "mlflow_run_id", "method", "loss", "assignment", "calibrated_on"), str),
    **dict.fromkeys(("labels_moved", "bad_images"), list),
    "stopped_early": bool,
}
_REQUIRED_RESULT = ("top1_last", "top1_best", "num_validated", "num_classes", "epochs", "steps")
_ERROR: Fields = {
    **dict.fromkeys(("node", "host", "launch", "message", "traceback"), str),
    **dict.fromkeys(("rank", "exit_code"), int),
    **{"time": float, "final": bool, "error": dict},
}
_USER_ERROR = {"field": str, "message": str, "remedy": str}
_OWNER: Fields = {"host": str, "pid": int, "id": str, "launch": str, "machine": str, "processes": str}
_warned: set[tuple[Path, str]] = set()
"""Damaged files that this process has warned about, with the reason."""

_CHECKPOINT_NAME = re.compile(r"step-(\d{9,})")
_EARLY = {"cancelled", "checkpoints", "logs", "notifications", "slurm", "stop"}
"""Names that a run directory can contain before its first attempt."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint at a global step."""
    return f"step-{step:09d}"


def checkpoint_step(name: str) -> int | None:
    """Global step of a checkpoint's folder name; None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a run's checkpoints folder, ascending."""
    markers = folder.glob(f"step-*/{CHECKPOINT_MARKER}")
    return sorted(step for m in markers if (step := checkpoint_step(m.parent.name)) is not None)


def find_model_file(path: Path) -> Path:
    """Return the model file of a run directory or an export; `path` may also be the file itself.

    Raises:
        UserError: there is no model file.
    """
    file = path / MODEL if path.is_dir() else path
    if not file.is_file():
        remedy = "Give a finished run, an export, or the model file."
        message = f"contains no {MODEL}" if path.exists() else "does not exist"
        raise UserError("model", str(path), message, remedy)
    return file


def warn_damaged(path: Path, reason: str) -> None:
    """Log once per process that a file is damaged and therefore not used."""
    if (path, reason) not in _warned:
        _warned.add((path, reason))
        log.warning("%s is damaged (%s) and is not used", path, reason)


def _read_errors(paths: Iterable[Path], *required: str) -> list[dict[str, Any]]:
    """Read error reports, which have a message and the required fields; damaged ones are logged."""
    reports: list[dict[str, Any]] = []
    for path in paths:
        try:
            report = read_record(path, _ERROR, ["message", *required]) or {}
            if report.get("error"):
                check_record(report["error"], _USER_ERROR, _USER_ERROR)
            reports.append(report)
        except DamagedFile as damaged:
            warn_damaged(path, damaged.reason)
        except ValueError as error:
            warn_damaged(path, f"error is damaged: {error}")
    return [report for report in reports if report]


class RunDirectory:
    """Paths of one run, its status and its error reports.

    Args:
        root: the folder; it does not have to exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.environment = root / "environment.json"
        self.status_file = root / "status.json"
        self.checkpoints = root / "checkpoints"
        self.logs = root / "logs"
        self.matchings = root / "matchings.jsonl"
        self.pictures = root / "pictures"
        self.profile = root / "profile"
        self.model = root / MODEL
        self.result = root / "result.json"
        self.validation = root / "validation.json"
        self.predictions = root / "predictions.npz"
        self.evaluations = root / "evaluations"
        self.code = root / "code"
        self.export = root / "export"
        self.stop_file = root / "stop"
        self.cancelled_file = root / "cancelled"
        self.notifications = root / "notifications"
        self.owner_file = root / "owner.json"
        self.owner_lock = root / "owner.lock"
        self.events = root / "events"
        self.spool = self.events / "events.jsonl"
        self.identity = self.events / "run.json"
        self.place = self.events / "place.json"
        self.sync_state = self.events / "mlflow.json"
        self.sync_lock = self.events / "mlflow.json.lock"
        self.mlflow_model = self.events / "mlflow-model"
        self.submission = root / "slurm"
        self.job = self.submission / "job.json"
        self.submitted_config = self.submission / "config.yaml"
        self.accepted_config = self.submission / "accepted.yaml"
        self.submitted_diff = self.submission / "code.diff"
        self.submit_lock = self.submission / "submit.lock"
        self.sweep_log = self.logs / "sweep.log"
        self.summary_page = root / "summary.html"
        self.confusion_page = root / "confusion.html"
        self.confusion_pairs = root / "confusion_pairs.csv"
        self.per_class_page = root / "per_class.html"
        self.nearest_page = root / "nearest.html"
        self.per_class_csv = root / "per_class.csv"
        self.per_class_json = root / "per_class.json"

    def check_place(self) -> None:
        """Check that the run directory can be created, without creating it.

        Raises:
            UserError: the folder cannot be written or contains other files.
        """
        try:
            if self.root.is_dir():
                self._check_no_other_files()
            try_to_write(self.root)
        except OSError as error:
            raise self.not_writable(error) from None

    def _check_no_other_files(self) -> None:
        """Refuse a folder with other files and no run, such as a home directory or the folder of all runs."""
        # Another node may be creating the run's files now, the lock first: a single listing is consistent.
        names = {path.name for path in self.root.iterdir()}
        if names & {self.owner_lock.name, self.owner_file.name, self.status_file.name}:
            return
        if foreign := sorted(name for name in names - _EARLY if not name.startswith(".")):
            message = f"contains other files and no run: {', '.join(foreign[:3])}"
            raise UserError("run-dir", str(self.root), message, "Give a new or empty folder.")

    def create(self) -> None:
        """Create the folders.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            probe = self.root / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self.not_writable(error) from None

    def not_writable(self, error: OSError) -> UserError:
        """Error for a folder that refuses files."""
        error = full_disk(error, self.root, 0) or error
        remedy = "Choose another with --run-dir"
        if in_container():
            remedy += ', or mount one of your folders: docker run -v DIR:/runs --user "$(id -u):$(id -g)"'
        return UserError("run-dir", str(self.root), f"cannot be written ({error.strerror})", f"{remedy}.")

    def status(self) -> dict[str, Any]:
        """Read the status; empty before the first attempt. The state of a damaged one is `damaged`, with the reason."""
        try:
            return read_record(self.status_file, _STATUS) or {}
        except DamagedFile as damaged:
            attempt = self.last_attempt().get("attempt", 0)
            return {"state": DAMAGED, "error": damaged.problem, "attempt": attempt}

    def read_result(self) -> dict[str, Any]:
        """Read the result of a finished run; empty if the file is missing.

        Raises:
            DamagedFile: the file is damaged.
        """
        if checkpoint_steps(self.checkpoints):
            remedy = "Delete it, then repeat the `dl2pa train` command of the run: it is written again."
        else:
            remedy = (
                "Restore it from a backup or from the run's artifacts in MLflow; the run has no checkpoint."
            )
        return read_record(self.result, _RESULT, _REQUIRED_RESULT, remedy) or {}

    def is_accepted(self) -> bool:
        """Whether the current attempt has passed every check: `environment.json` lists it."""
        return self.last_attempt().get("attempt", 0) == self.status().get("attempt")

    def last_attempt(self) -> dict[str, Any]:
        """Environment and data of the last attempt that passed every check; empty before the first one."""
        return next(reversed(self.attempts()), {})

    def withdraw_attempt(self, before: dict[str, Any], message: str) -> None:
        """Undo the status of an attempt that was refused before it started.

        Args:
            before: status before the attempt.
            message: reason, which becomes that of a run that no attempt has started.
        """
        fields = {key: before.get(key) for key in ("state", "error", "pid", "started", "attempt_started")}
        if not before.get("attempt"):
            fields |= {"state": "failed", "error": message}
        self.write_status(**fields, attempt=before.get("attempt", 0))

    def write_status(self, **fields: Any) -> None:
        """Update fields of the status."""
        status = {**self.status(), **fields, "updated": time.time()}
        write_json(self.status_file, status, indent=1)

    def attempts(self) -> list[dict[str, Any]]:
        """Read the environment of each attempt, first to last; empty before the first one, or if it is damaged."""
        try:
            content = read_record(self.environment, {"attempts": list}, ["attempts"]) or {"attempts": []}
            return [check_record(attempt, _ATTEMPT) for attempt in content["attempts"]]
        except DamagedFile as damaged:
            warn_damaged(self.environment, damaged.reason)
        except ValueError as error:
            warn_damaged(self.environment, f"an attempt is damaged: {error}")
        return []

    def set_aside_environment(self) -> None:
        """Rename a damaged `environment.json`, so that the next attempt does not replace what it contains."""
        if not self.attempts() and self.environment.is_file():
            self.environment.replace(self.environment.with_name("environment.damaged.json"))

    def picture(self, name: str) -> Path:
        """Figure of the run, for example `curves`."""
        return self.pictures / f"{name}.png"

    def example_file(self, suffix: str) -> Path:
        """Input example of the logged model: an encoded image."""
        return self.root / f"example.{suffix}"

    def find_example(self) -> Path | None:
        """The input example that was written; None without one."""
        return next(iter(sorted(self.root.glob("example.*"))), None)

    def checkpoint_model(self, which: str) -> Path:
        """Model file written from the `latest` or `best` checkpoint."""
        return self.root / f"model-{which}.safetensors"

    def evaluation_file(self, name: str) -> Path:
        """Record of an evaluation; `name` may contain a folder, as in `ood/svhn`."""
        return self.evaluations / f"{name}.json"

    def node_metrics(self, node: int | str) -> Path:
        """System metrics of a node other than the first; `*` gives the pattern of all of them."""
        return self.events / f"system-{node}.jsonl"

    def rank_log(self, rank: int) -> Path:
        """Log of one training process."""
        return self.logs / f"rank-{rank}.log"

    def node_error_file(self, node: str) -> Path:
        """Error report of a node that failed before, or without, one of its ranks."""
        return self.logs / f"node-{node}.error.json"

    def error_file(self, rank: int, *, refused: bool = False) -> Path:
        """Error report of one training process; a refused attempt does not replace that of an earlier one."""
        return self.logs / f"rank-{rank}{'.refused' if refused else ''}.error.json"

    def logged_ranks(self) -> list[int]:
        """Ranks that have a log, in order."""
        names = (path.stem.removeprefix("rank-") for path in self.logs.glob("rank-*.log"))
        return sorted(int(name) for name in names if re.fullmatch("[0-9]{1,9}", name))

    def error_reports(self) -> list[dict[str, Any]]:
        """Error reports of the ranks and nodes of all launches."""
        return _read_errors(self.logs.glob("*.error.json"))

    def errors(self, launch: str) -> list[dict[str, Any]]:
        """Error reports of one launch's ranks, ordered by time."""
        reports = _read_errors(self.logs.glob("rank-*.error.json"), "rank")
        return sorted(
            (report for report in reports if report.get("launch") == launch),
            key=lambda report: report.get("time") or 0.0,
        )

    def stall_counters(self) -> list[Path]:
        """Files in which the batch script counts attempts without progress."""
        return list(self.submission.glob("without-progress.*"))

    def owner(self) -> dict[str, Any]:
        """Read host, process id and launch of the current or last owner; empty if there is none."""
        try:
            return read_record(self.owner_file, _OWNER, ["host", "pid"]) or {}
        except DamagedFile:
            return {}

    def is_taken_over(self, before: dict[str, Any], launch: str) -> bool:
        """Whether a process of another launch has become the owner.

        Args:
            before: owner at the start of this launch.
        """
        owner = self.owner()
        return bool(owner) and owner != before and owner.get("launch") != launch
