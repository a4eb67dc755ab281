"""Records of submissions: one in each run directory, and a list in the user's home to find runs by job number."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dl2pa.errors import UserError
from dl2pa.osutil import write_json
from dl2pa.records import DamagedFile, check_record, parse_record, read_record
from dl2pa.rundir import RunDirectory
from launcher.request import Request

_FIELDS = {**dict.fromkeys(("job_id", "run_dir", "log", "name", "cwd"), str), "request": dict}
_NUMBER = re.compile(r"\d+(_\d+)?")


@dataclass(frozen=True)
class Submission:
    """The last submission of a run.

    Args:
        job_id: `N`, or `N_K` for a task of an array.
        run_dir: the run directory, which may no longer exist.
        log: log of the job; None if the record in the run directory is missing or damaged.
        request: requested resources, the fields of `Request`.
        name: name of the run.
        cwd: working directory of the submission.
    """

    job_id: str
    run_dir: Path
    log: Path | None = None
    request: Mapping[str, Any] = field(default_factory=dict[str, Any])
    name: str = ""
    cwd: Path = Path()


def read(run_dir: Path) -> Submission | None:
    """Return the last submission of a run; None if there is none or its record is damaged, see `damage`."""
    try:
        return _read(run_dir)
    except DamagedFile:
        return None


def last(run_dir: Path) -> Submission | None:
    """Return the last submission of a run; without details from this user's list if its record is damaged."""
    try:
        return _read(run_dir)
    except DamagedFile:
        return next((entry for entry in reversed(_listed()) if entry.run_dir == run_dir), None)


def damage(run_dir: Path) -> str | None:
    """What is wrong with the record of a run's submission; None if it can be read or is missing."""
    try:
        _read(run_dir)
        return None
    except DamagedFile as damaged:
        return damaged.problem


def _read(run_dir: Path) -> Submission | None:
    file = RunDirectory(run_dir).job
    value = read_record(file, _FIELDS, ["job_id"])
    if value is None:
        return None
    try:
        Request.of(value.get("request") or {})
    except ValueError as error:
        raise DamagedFile(file, f"request: {error}") from None
    return Submission(
        value["job_id"],
        run_dir,
        Path(value["log"]) if value.get("log") else None,
        value.get("request") or {},
        value.get("name") or run_dir.name,
        Path(value.get("cwd") or "."),
    )


def write(submission: Submission, **more: Any) -> None:
    """Record a submission in the run directory and in this user's list.

    Args:
        more: additional fields of the record.
    """
    path = RunDirectory(submission.run_dir).job
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {
        "job_id": submission.job_id,
        "run_dir": str(submission.run_dir),
        "log": str(submission.log),
        "name": submission.name,
        "cwd": str(submission.cwd),
        "request": dict(submission.request),
        "submitted": time.time(),
        **more,
    }
    write_json(path, fields, indent=1)
    line = json.dumps({"job_id": submission.job_id, "run_dir": str(submission.run_dir)})
    try:
        _list_file().parent.mkdir(parents=True, exist_ok=True)
        with _list_file().open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # starts a new line, because the last one may be truncated
    except OSError:
        return  # the home cannot be written; the record in the run directory is enough


def known() -> list[Submission]:
    """Return all submissions of this user, oldest first; without details if the run directory is deleted."""
    latest: dict[Path, Submission] = {}
    for entry in _listed():
        latest.pop(entry.run_dir, None)
        latest[entry.run_dir] = read(entry.run_dir) or entry
    return list(latest.values())


def find(job: str) -> list[Submission]:
    """Return the submissions named by a job number, an array number or a run directory.

    Raises:
        UserError: there is none, or a later submission of the run has replaced it.
    """
    if not job:
        raise UserError("job", job, "is empty (an unset variable?)", "Name a job of `dl2pa jobs`.")
    if _NUMBER.fullmatch(job):
        entries = [e for e in _listed() if e.job_id == job or e.job_id.startswith(f"{job}_")]
        latest = {e.run_dir: read(e.run_dir) or e for e in entries}
        kept = [s for s in latest.values() if s.job_id == job or s.job_id.startswith(f"{job}_")]
        if kept:
            return kept
        if latest:
            newer = next(iter(latest.values()))
            message = f"was replaced: {newer.run_dir} is now job {newer.job_id}"
            raise UserError("job", job, message, "Name the new job or the run directory.")
    submission = read(Path(job).absolute())
    if submission is not None:
        return [submission]
    if _exists(Path(job)):
        remedy = "Name a job of `dl2pa jobs`, or submit it with `dl2pa submit CONFIG --run-dir`."
        run, problem = RunDirectory(Path(job).absolute()), damage(Path(job).absolute())
        if problem is None and run.status_file.is_file():
            remedy = "Stop its `dl2pa train` with Ctrl-C or TERM, its job with scancel; the same command continues it."
            raise UserError("job", job, "is a run that was started without `dl2pa submit`", remedy)
        text = f"has no readable {RunDirectory(Path()).job}" + (f": {problem}" if problem else "")
        raise UserError("job", job, text, remedy)
    message = "is not a dl2pa job that this user submitted from this home directory"
    raise UserError("job", job, message, "Give its run directory instead.")


def find_one(job: str) -> Submission:
    """Return the submission of one run.

    Raises:
        UserError: there is none, or the number names an array.
    """
    submissions = find(job)
    if len(submissions) > 1:
        remedy = f"Name one of them, for example {submissions[0].job_id}."
        raise UserError("job", job, f"names {len(submissions)} runs", remedy)
    return submissions[0]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long
        return False


def _list_file() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(base) / "dl2pa/jobs.jsonl"


def _listed() -> list[Submission]:
    """Return the entries of the user's list; damaged lines are skipped."""
    try:
        lines = _list_file().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    entries: list[Submission] = []
    for line in lines:
        try:
            value = check_record(parse_record(line), _FIELDS, ["job_id", "run_dir"])
        except ValueError:
            continue
        if all(0 < len(value[name]) < 4096 for name in ("job_id", "run_dir")):
            entries.append(Submission(value["job_id"], Path(value["run_dir"])))
    return entries
