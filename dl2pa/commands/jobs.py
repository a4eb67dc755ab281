"""`dl2pa jobs`: list this user's runs, on the cluster and on this machine, with progress and remaining time."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dl2pa.commands.options import nonempty_text
from dl2pa.commands.output import note, table
from dl2pa.commands.run_states import LIVE, RunStates, find_runs, is_local
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, UserError
from dl2pa.rundir import DAMAGED, RunDirectory
from dl2pa.training.display import duration
from launcher import jobs, submissions
from launcher.submissions import Submission

_COLUMNS = ("job_id", "state", "nodes", "attempt", "epoch", "step", "images/s", "eta", "top1", "run_dir")

_MAX_ENDED = 20
"""Ended jobs, and runs of this machine, that are listed if none is live."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "job", nargs="*", type=nonempty_text, help="job number, array number or run directory; default: all"
    )
    parser.add_argument("--all", action="store_true", help="also list ended jobs and runs")


def run(args: argparse.Namespace) -> int:
    local = [Path(job).absolute() for job in args.job if is_local(Path(job))]
    named = [s for job in args.job if Path(job).absolute() not in local for s in submissions.find(job)]
    listed = named if args.job else _all_submissions()
    if not args.job:
        local = [folder for folder in find_runs(Path("runs")) if is_local(folder)]
    answered = True
    try:
        states = jobs.states(s.job_id for s in listed)
    except ConnectionError as error:
        note(str(error))
        states, answered = {s.job_id: jobs.UNKNOWN for s in listed}, False
    submitted = [describe(s, states[s.job_id]) for s in listed]
    here = [_describe_local(row) for row in RunStates().describe(local)]
    if not args.job:  # list a deleted directory only while its job is live
        submitted = [row for row in submitted if row["live"] or Path(row["run_dir"]).is_dir()]
    rows = [*submitted, *here]
    if not args.job and not args.all:
        rows = [row for row in rows if row["live"]] or [*submitted[-_MAX_ENDED:], *here[-_MAX_ENDED:]]
    if args.json:
        print(json.dumps(rows), flush=True)  # noqa: T201
    elif rows:
        table([_COLUMNS, *([_cells(row)[c] for c in _COLUMNS] for row in rows)])
    else:
        note("no runs here and no submitted ones")
    for directory, problem in _damages(rows if args.job else [*rows, *_unlisted()]):
        note(f"damaged: {directory}: {problem}")
    if (
        answered
        and any(row["job_id"] and row["state"] == "UNKNOWN" for row in rows)
        and not jobs.has_accounting()
    ):
        note("UNKNOWN: the job has left the queue and sacct does not answer; see run_state")
    return EXIT_DONE if answered else EXIT_FAILURE


def _damages(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the runs with a damaged status or record of their submission, with the reason."""
    for directory in dict.fromkeys(row["run_dir"] for row in rows):
        status = RunDirectory(Path(directory)).status()
        if status.get("state") == DAMAGED:
            yield directory, str(status["error"])
        if problem := submissions.damage(Path(directory)):
            yield directory, problem


def _unlisted() -> list[dict[str, Any]]:
    """Return the run directories in `runs/` that only a damaged record could name."""
    folders = sorted(path.absolute() for path in Path("runs").glob("*/"))
    return [{"run_dir": str(folder)} for folder in folders if submissions.damage(folder)]


def _describe_local(row: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a run on this machine or one that trains under another launcher, with the keys of ``describe``."""
    names = ("attempt", "epoch", "step", "total_steps", "images_per_second", "eta_seconds", "top1", "run_dir")
    return {
        "job_id": None,
        "state": str(row["state"]).upper(),
        "reason": None,
        "nodes": row["host"],
        **{name: row[name] for name in names},
        "epoch": row["epoch"] or 0,
        "step": row["step"] or 0,
        "run_state": row["state"],
        "live": row["state"] in LIVE,
    }


def describe(submission: Submission, state: jobs.JobState) -> dict[str, Any]:
    """Describe one run by the SLURM state of its job and by its status file."""
    run = RunDirectory(submission.run_dir)
    status = run.status()
    job_state = state.state
    if job_state in ("UNKNOWN", "FAILED") and run.cancelled_file.exists():
        job_state = "CANCELLED"  # by `dl2pa cancel`, after which the batch script ends with its own exit code
    return {
        "job_id": submission.job_id,
        "state": job_state,
        "reason": state.reason or None,
        "nodes": state.nodes or None,
        "attempt": _number(status, "attempt") or 0,
        "epoch": _number(status, "epoch") or 0,
        "step": _number(status, "step") or 0,
        "total_steps": _number(status, "total_steps"),
        "images_per_second": _number(status, "images_per_second"),
        "eta_seconds": seconds_left(status, run) if state.is_live else None,
        "top1": _number(status, "top1"),
        "run_state": status.get("state"),
        "run_dir": str(run.root),
        "live": state.is_live,
    }


def seconds_left(status: Mapping[str, Any], run: RunDirectory) -> float | None:
    """Remaining time that the run estimated last; of a run of an older version, that of the steps. None if unknown."""
    from dl2pa.config import load_recorded_config

    if (left := _number(status, "eta_seconds")) is not None and math.isfinite(left):
        return left
    speed, step, total = (_number(status, k) for k in ("images_per_second", "step", "total_steps"))
    if not speed or not math.isfinite(speed) or step is None or not total:
        return None
    try:
        batch = load_recorded_config(run.submitted_config).train.batch_size
    except UserError:
        return None
    return (total - step) * batch / speed


def _number(status: Mapping[str, Any], key: str) -> Any:
    """Return a number of the status; None if the value is not a number."""
    value = status.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _all_submissions() -> list[Submission]:
    """Return the submissions on this user's list and of the run directories in `runs/`."""
    by_directory = {s.run_dir: s for s in submissions.known()}
    for folder in sorted(path.absolute() for path in Path("runs").glob("*/")):
        submission = submissions.read(folder)
        if submission is not None:
            by_directory.setdefault(folder, submission)
    return list(by_directory.values())


def _cells(row: dict[str, Any]) -> dict[str, str]:
    state = row["state"] if row["state"] != "UNKNOWN" else f"UNKNOWN ({row['run_state'] or 'not started'})"
    if row["reason"] and row["reason"] != "None":
        state = f"{state} ({row['reason']})"
    steps = f"{row['step']}/{row['total_steps']}" if row["total_steps"] else str(row["step"])
    return {
        "job_id": row["job_id"] or "local",
        "state": state,
        "nodes": row["nodes"] or "-",
        "attempt": str(row["attempt"]),
        "epoch": str(row["epoch"]),
        "step": steps,
        "images/s": "-" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}",
        "eta": "-" if row["eta_seconds"] is None else duration(row["eta_seconds"]),
        "top1": "-" if row["top1"] is None else f"{row['top1']:.2f}",
        "run_dir": row["run_dir"],
    }
