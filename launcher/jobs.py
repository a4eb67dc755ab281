"""What the cluster says about jobs, where their runs are, and how to stop them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa.errors import UserError

JOB_FILE = "slurm/job.json"
"""In a run directory: its last submission."""
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED")
_NUMBER = re.compile(r"\d+(_\d+)?")
_QUEUE_FORMAT = "%i|%A|%F|%K|%T|%r|%N|%S"


@dataclass(frozen=True)
class JobState:
    """A job as SLURM sees it.

    Args:
        state: SLURM's word for it, or `UNKNOWN` where neither the queue nor accounting knows it.
        reason: why it is pending; empty otherwise.
        nodes: its node list, empty while it has none.
    """

    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it runs, or will."""
        return self.state in LIVE


UNKNOWN = JobState("UNKNOWN")


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """The state of each job: from the queue, else from accounting, else `UNKNOWN`.

    Raises:
        ConnectionError: SLURM does not answer.
    """
    wanted = set(job_ids)
    found = {job: state for job, state in _queued().items() if job in wanted} if wanted else {}
    missing = wanted - set(found)
    found.update({job: state for job, state in _accounted(missing).items() if job in missing})
    return {job: found.get(job, UNKNOWN) for job in wanted}


def is_live(run_dir: Path) -> str | None:
    """The run's job, where it runs or waits."""
    job = read_job(run_dir).get("job_id")
    return job if job and states([job])[job].is_live else None


def has_accounting() -> bool:
    """Whether the cluster remembers jobs that have ended."""
    return shutil.which("sacct") is not None and _output(["sacct", "-n", "-X", "-S", "now"]) is not None


def read_job(run_dir: Path) -> dict[str, Any]:
    """The run's last submission; empty where there was none."""
    try:
        value = json.loads((run_dir / JOB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_job(run_dir: Path, fields: Mapping[str, Any]) -> None:
    """Note a submission in the run directory and in this user's list, which finds runs by their jobs."""
    path = run_dir / JOB_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps({**fields, "submitted": time.time()}, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    line = json.dumps({"job_id": fields["job_id"], "run_dir": str(run_dir)}) + "\n"
    try:
        _list_file().parent.mkdir(parents=True, exist_ok=True)
        with _list_file().open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError:
        return  # a home that cannot be written: `dl2pa jobs RUN` still finds it


def known_runs() -> list[Path]:
    """Run directories this user submitted, the oldest first, those that are gone left out."""
    runs: dict[Path, None] = {}
    for entry in _listed():
        path = Path(entry.get("run_dir", ""))
        runs.pop(path, None)
        if (path / JOB_FILE).is_file():
            runs[path] = None
    return list(runs)


def find_runs(job: str) -> list[Path]:
    """The run directories of a job's number, of an array's number, or of a run directory's path.

    Raises:
        UserError: none is known.
    """
    path = Path(job)
    if (path / JOB_FILE).is_file():
        return [path.absolute()]
    if _NUMBER.fullmatch(job):
        found = [
            Path(e["run_dir"])
            for e in _listed()
            if e.get("job_id") == job or str(e.get("job_id")).startswith(f"{job}_")
        ]
        kept = [p for p in dict.fromkeys(found) if (p / JOB_FILE).is_file()]
        if kept:
            return kept
    if path.is_dir():
        remedy = "Name a job of `dl2pa jobs`, or submit it first."
        raise UserError("job", job, "was never submitted to SLURM", remedy)
    raise UserError(
        "job", job, "is no job of dl2pa's that this user submitted here", "Give its run directory instead."
    )


def find_run(job: str) -> Path:
    """The run directory of one job.

    Raises:
        UserError: none is known, or the number is that of an array.
    """
    found = find_runs(job)
    if len(found) > 1:
        first = read_job(found[0]).get("job_id")
        raise UserError("job", job, f"names {len(found)} runs", f"Name one of them, for example {first}.")
    return found[0]


def cancel(job_ids: Sequence[str]) -> None:
    """End jobs at once, waiting ones too.

    Raises:
        UserError: SLURM refuses.
    """
    done = subprocess.run(["scancel", *job_ids], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(
            "job", ", ".join(job_ids), done.stderr.strip() or "cannot be cancelled", "See `squeue`."
        )


def kill_steps(job_ids: Sequence[str], wait_s: float = 5.0) -> None:
    """End the jobs' processes, so that a cancellation that follows finds none to warn; no error where none runs.

    By HUP, which the launcher does not survive and nothing survives the launcher: SLURM takes a KILL for a
    cancellation and sends TERM first.
    """
    subprocess.run(["scancel", "--signal=HUP", *job_ids], capture_output=True, check=False)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        steps = (
            _output(["squeue", "--noheader", "--steps", "--format=%i", f"--jobs={','.join(job_ids)}"]) or ""
        )
        if all(step.endswith((".batch", ".extern")) for step in steps.split()):
            return
        time.sleep(0.1)


def _queued() -> dict[str, JobState]:
    """Every job of this user's in the queue; an array's waiting elements under their own numbers."""
    text = _output(["squeue", "--me", "--array", "--noheader", "--states=all", f"--format={_QUEUE_FORMAT}"])
    if text is None:
        raise ConnectionError("SLURM does not answer (squeue): what became of the job is not known now")
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        number, _, array, element, state, reason, nodes, _ = line.split("|")
        job = f"{array}_{element}" if element.isdigit() else number
        found[job] = JobState(state, reason if state == "PENDING" else "", nodes)
    return found


def _accounted(job_ids: Iterable[str]) -> dict[str, JobState]:
    ids = sorted(job_ids)
    if not ids or shutil.which("sacct") is None:
        return {}
    command = ["sacct", "-n", "-X", "-P", "--array", "-o", "JobID,State,NodeList", "-j", ",".join(ids)]
    found: dict[str, JobState] = {}
    for line in (_output(command) or "").splitlines():
        job, state, nodes = line.split("|")
        words = state.split()  # "CANCELLED by 0"
        found[job] = JobState(words[0] if words else "UNKNOWN", "", "" if nodes == "None assigned" else nodes)
    return found


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _list_file() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(base) / "dl2pa/jobs.jsonl"


def _listed() -> list[dict[str, Any]]:
    try:
        lines = _list_file().read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    entries: list[dict[str, Any]] = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            entries.append(value)
    return entries
