"""Which run a job is of: noted in the run directory, and in a list in the user's home that finds runs by their jobs."""

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
from dl2pa.osutil import read_json, write_json
from dl2pa.rundir import RunDirectory

JOB_FILE = str(RunDirectory(Path()).job)
"""A run's last submission, relative to the run directory."""
_NUMBER = re.compile(r"\d+(_\d+)?")


@dataclass(frozen=True)
class Submission:
    """A run's last submission.

    Args:
        job_id: `N`, or `N_K` of an array.
        run_dir: the run's directory, which may be gone.
        log: the job's log; None where the note in the run directory is gone or damaged.
        request: what it asked of the cluster, as `Request` has it.
        name: of the run.
        cwd: where it was submitted from.
    """

    job_id: str
    run_dir: Path
    log: Path | None = None
    request: Mapping[str, Any] = field(default_factory=dict[str, Any])
    name: str = ""
    cwd: Path = Path()


def read(run_dir: Path) -> Submission | None:
    """The run's last submission; None where there was none, or its note is damaged."""
    value = read_json(RunDirectory(run_dir).job)
    if not isinstance(value.get("job_id"), str):
        return None
    texts = {k: v for k in ("log", "name", "cwd") if isinstance(v := value.get(k), str)}
    request = value.get("request")
    return Submission(
        value["job_id"],
        run_dir,
        Path(texts["log"]) if "log" in texts else None,
        request if isinstance(request, dict) else {},
        texts.get("name", run_dir.name),
        Path(texts.get("cwd", ".")),
    )


def write(submission: Submission, **more: Any) -> None:
    """Note a submission in the run directory and in this user's list.

    Args:
        more: what else is worth knowing of it.
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
            file.write(f"\n{line}\n")  # on a line of its own, even behind one that was cut short
    except OSError:
        return  # a home that cannot be written: the run directory still knows


def known() -> list[Submission]:
    """Every run this user submitted, the oldest first; of a directory that is gone what the list says."""
    found: dict[Path, Submission] = {}
    for entry in _listed():
        found.pop(entry.run_dir, None)
        found[entry.run_dir] = read(entry.run_dir) or entry
    return list(found.values())


def find(job: str) -> list[Submission]:
    """The submissions that a job's number, an array's number or a run directory's path names.

    Raises:
        UserError: none is known, or the number is of a submission that a later one has replaced.
    """
    if not job:
        raise UserError("job", job, "an empty name (an unset variable?)", "Name a job of `dl2pa jobs`.")
    if _NUMBER.fullmatch(job):
        entries = [e for e in _listed() if e.job_id == job or e.job_id.startswith(f"{job}_")]
        latest = {e.run_dir: read(e.run_dir) or e for e in entries}
        kept = [s for s in latest.values() if s.job_id == job or s.job_id.startswith(f"{job}_")]
        if kept:
            return kept
        if latest:
            newer = next(iter(latest.values()))
            message = f"was replaced: {newer.run_dir} is now job {newer.job_id}"
            raise UserError("job", job, message, "Name that, or the run directory.")
    submission = read(Path(job).absolute())
    if submission is not None:
        return [submission]
    if _exists(Path(job)):
        remedy = "Name a job of `dl2pa jobs`, or submit it with `dl2pa submit CONFIG --run-dir`."
        raise UserError("job", job, f"holds no readable {JOB_FILE}", remedy)
    remedy = "Give its run directory instead."
    raise UserError("job", job, "is no job of dl2pa's that this user submitted here", remedy)


def find_one(job: str) -> Submission:
    """The submission of one run.

    Raises:
        UserError: none is known, or the number is that of an array.
    """
    found = find(job)
    if len(found) > 1:
        remedy = f"Name one of them, for example {found[0].job_id}."
        raise UserError("job", job, f"names {len(found)} runs", remedy)
    return found[0]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long to be one
        return False


def _list_file() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(base) / "dl2pa/jobs.jsonl"


def _listed() -> list[Submission]:
    """The list's entries; lines that are none are passed over."""
    try:
        lines = _list_file().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    entries: list[Submission] = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        texts = [value.get(k) for k in ("job_id", "run_dir")] if isinstance(value, dict) else []
        if len(texts) == 2 and all(isinstance(t, str) and 0 < len(t) < 4096 for t in texts):
            entries.append(Submission(str(texts[0]), Path(str(texts[1]))))
    return entries
