"""State and progress of many runs, read from their small files only."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dl2pa.ownership import seems_alive
from dl2pa.rundir import RunDirectory
from launcher import jobs, submissions
from launcher.submissions import Submission

_MAX_DEPTH = 4
"""Folders below the given one in which runs are searched."""
_NO_RUNS_IN = ("mlartifacts", "mlruns")
_QUERY_SLURM_S = 15.0
_FIGURES = (
    *("epoch", "epochs", "step", "total_steps", "loss", "lr", "images_per_second", "top1", "top1_best"),
    *("gpu_percent", "updated"),
)
"""Numbers of the status that are shown as they are."""
LIVE = ("running", "stopping", "starting", "queued")
"""States of runs that train or are going to."""
_ORDER = (*LIVE, "killed", "failed", "damaged", "stopped", "cancelled", "submitted", "finished")
_ACTIVE = ("running", "stopping")


def find_runs(folder: Path) -> list[Path]:
    """Run directories at or below a folder, sorted by path; folders inside a run directory are not searched."""
    return sorted(_runs_below(folder.absolute(), _MAX_DEPTH, set()))


def _runs_below(folder: Path, depth: int, seen: set[tuple[int, int]]) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    try:
        status = folder.stat()
        entries = list(os.scandir(folder)) if depth else []
    except OSError:
        return
    if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        if not entry.name.startswith(".") and entry.name not in _NO_RUNS_IN and _is_folder(entry):
            yield from _runs_below(folder / entry.name, depth - 1, seen)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be entered
        return False


def is_run(folder: Path) -> bool:
    """Whether a folder is the directory of a run that was started or submitted."""
    run = RunDirectory(folder)
    return any(os.path.isfile(path) for path in (run.status_file, run.job))  # noqa: PTH113  (half the time)


def is_local(folder: Path) -> bool:
    """Whether a folder is a run that was started without `dl2pa submit`."""
    run = RunDirectory(folder)
    return os.path.isfile(run.status_file) and not os.path.exists(run.job)  # noqa: PTH113, PTH110


def is_running(folder: Path) -> bool:
    """Whether a run trains now or is going to."""
    (row,) = RunStates().describe([folder])
    return row["state"] in LIVE


class RunStates:
    """Reads the state of runs again and again; a file that has not changed is not read again."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[tuple[int, int], Any]] = {}
        self._beats: dict[Path, int] = {}
        self._jobs: dict[str, jobs.JobState] = {}
        self._queried = -_QUERY_SLURM_S
        self.slurm_answers = True
        """Whether the last query of job states succeeded."""

    def describe(self, folders: Iterable[Path]) -> list[dict[str, Any]]:
        """Describe the runs, those that train first."""
        runs = [RunDirectory(folder) for folder in folders]
        found = [(run, self._status(run), self._submission(run)) for run in runs]
        self._query_slurm(
            [sub.job_id for _, status, sub in found if sub and status.get("state") != "finished"]
        )
        rows = [self._row(*entry) for entry in found]
        return sorted(rows, key=lambda row: (_ORDER.index(row["state"]), row["run_dir"]))

    def _row(self, run: RunDirectory, status: Mapping[str, Any], sub: Submission | None) -> dict[str, Any]:
        job = self._jobs.get(sub.job_id, jobs.UNKNOWN) if sub else None
        state = self._state(run, status, job)
        left = _number(status, "eta_seconds")
        if left is not None:
            left = max(0.0, left - max(0.0, time.time() - (_number(status, "updated") or 0.0)))
        return {
            "run_dir": str(run.root),
            "state": state,
            "job_id": sub.job_id if sub else None,
            "host": run.owner().get("host") if state in _ACTIVE else None,
            "attempt": _number(status, "attempt") or 0,
            **{name: _number(status, name) for name in _FIGURES},
            "eta_seconds": left if state in _ACTIVE else None,
            "error": status.get("error"),
        }

    def _state(self, run: RunDirectory, status: Mapping[str, Any], job: jobs.JobState | None) -> str:
        """State of a run from its status, its process and its job."""
        state = str(status.get("state") or "submitted")
        if job is not None and job.is_live and job.state not in ("RUNNING", "COMPLETING"):
            return "queued"
        if state in _ACTIVE and not self._is_alive(run):
            state = "killed"
        if state not in _ACTIVE and state != "finished":
            if job is not None and job.state == "RUNNING":
                return "starting"
            if run.cancelled_file.exists():
                return "cancelled"
        return state if state in _ORDER else "damaged"

    def _is_alive(self, run: RunDirectory) -> bool:
        """Whether the owner's process runs here, or its heartbeat is recent or was seen."""
        try:
            beat = run.owner_file.stat().st_mtime_ns
        except OSError:
            return False
        before = self._beats.setdefault(run.root, beat)
        self._beats[run.root] = beat
        return beat != before or seems_alive(run)

    def _status(self, run: RunDirectory) -> dict[str, Any]:
        return self._cached(run.status_file, run.status)

    def _submission(self, run: RunDirectory) -> Submission | None:
        return self._cached(run.job, lambda: submissions.read(run.root))

    def _cached(self, path: Path, read: Any) -> Any:
        try:
            status = path.stat()
        except OSError:
            return read()
        key = (status.st_mtime_ns, status.st_ino)
        if self._read.get(path, (None,))[0] != key:
            self._read[path] = key, read()
        return self._read[path][1]

    def _query_slurm(self, job_ids: Sequence[str]) -> None:
        """Query the states of jobs, with pauses, because the controller serves all users of a cluster."""
        if not job_ids or time.monotonic() - self._queried < _QUERY_SLURM_S:
            return
        self._queried = time.monotonic()
        try:
            self._jobs = jobs.states(job_ids)
            self.slurm_answers = True
        except ConnectionError:
            self.slurm_answers = False


def count_states(rows: Iterable[Mapping[str, Any]]) -> str:
    """Number of runs per state as text, such as `2 running, 5 finished`."""
    counts = Counter(row["state"] for row in rows)
    return ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state]) or "no runs"


def _number(status: Mapping[str, Any], key: str) -> Any:
    """A finite number of the status; None if it is missing or invalid."""
    value = status.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None
