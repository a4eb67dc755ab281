"""`dl2pa jobs`: this user's runs on the cluster, how far they are and when they will be done."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dl2pa.commands.output import note, table
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, UserError
from launcher import jobs, submissions
from launcher.submissions import Submission

_COLUMNS = ("job_id", "state", "nodes", "attempt", "epoch", "step", "images/s", "eta", "top1", "run_dir")


def run(args: argparse.Namespace) -> int:
    named = [submission for job in args.job for submission in submissions.find(job)]
    found = named or _everything()
    answered = True
    try:
        states = jobs.states(s.job_id for s in found)
    except ConnectionError as error:
        note(str(error))
        states, answered = {s.job_id: jobs.UNKNOWN for s in found}, False
    rows = [describe(s, states[s.job_id]) for s in found]
    if not named:  # a directory that is gone is of interest while its job lives
        rows = [row for row in rows if row["live"] or Path(row["run_dir"]).is_dir()]
    if not named and not args.all:
        rows = [row for row in rows if row["live"]] or rows[-20:]
    if args.json:
        print(json.dumps(rows), flush=True)  # noqa: T201
    elif rows:
        table([_COLUMNS, *([_texts(row)[c] for c in _COLUMNS] for row in rows)])
    else:
        note("no run was submitted from here")
    if answered and any(row["state"] == "UNKNOWN" for row in rows) and not jobs.has_accounting():
        note("UNKNOWN: the job has left the queue and no accounts answer (sacct); see run_state")
    return EXIT_DONE if answered else EXIT_FAILURE


def describe(submission: Submission, state: jobs.JobState) -> dict[str, Any]:
    """One run: what SLURM says of its job, and what its own status says."""
    from dl2pa.rundir import RunDirectory

    run_dir = submission.run_dir
    status = RunDirectory(run_dir).status()
    word = state.state
    if word in ("UNKNOWN", "FAILED") and (run_dir / "cancelled").exists():
        word = "CANCELLED"  # by `dl2pa cancel`, which lets the batch shell end in its own way
    return {
        "job_id": submission.job_id,
        "state": word,
        "reason": state.reason or None,
        "nodes": state.nodes or None,
        "attempt": _number(status, "attempt") or 0,
        "epoch": _number(status, "epoch") or 0,
        "step": _number(status, "step") or 0,
        "total_steps": _number(status, "total_steps"),
        "images_per_second": _number(status, "images_per_second"),
        "eta_seconds": seconds_left(status, run_dir) if state.is_live else None,
        "top1": _number(status, "top1"),
        "run_state": status.get("state"),
        "run_dir": str(run_dir),
        "live": state.is_live,
    }


def seconds_left(status: Mapping[str, Any], run_dir: Path) -> float | None:
    """Time that the run's remaining steps take at its last speed; None where that is not known."""
    from dl2pa.config import load_recorded_config

    speed, step, total = (_number(status, k) for k in ("images_per_second", "step", "total_steps"))
    if not speed or step is None or not total:
        return None
    try:
        batch = load_recorded_config(run_dir / "slurm/config.yaml").train.batch_size
    except UserError:
        return None
    return (total - step) * batch / speed


def _number(status: Mapping[str, Any], key: str) -> Any:
    """A number of the status; None where it is none (a file damaged by hand)."""
    value = status.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _everything() -> list[Submission]:
    found = {s.run_dir: s for s in submissions.known()}
    for path in sorted(Path("runs").glob(f"*/{submissions.JOB_FILE}")):
        submission = submissions.read(path.parents[1].absolute())
        if submission is not None:
            found.setdefault(submission.run_dir, submission)
    return list(found.values())


def _texts(row: dict[str, Any]) -> dict[str, str]:
    state = row["state"] if row["state"] != "UNKNOWN" else f"UNKNOWN ({row['run_state'] or 'not started'})"
    if row["reason"] and row["reason"] != "None":
        state = f"{state} ({row['reason']})"
    of_total = f"{row['step']}/{row['total_steps']}" if row["total_steps"] else str(row["step"])
    return {
        "job_id": row["job_id"],
        "state": state,
        "nodes": row["nodes"] or "-",
        "attempt": str(row["attempt"]),
        "epoch": str(row["epoch"]),
        "step": of_total,
        "images/s": "-" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}",
        "eta": "-" if row["eta_seconds"] is None else _duration(row["eta_seconds"]),
        "top1": "-" if row["top1"] is None else f"{row['top1']:.2f}",
        "run_dir": row["run_dir"],
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
