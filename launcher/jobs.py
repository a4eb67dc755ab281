"""Query and cancel SLURM jobs."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dl2pa.errors import UserError

COMMENT = "dl2pa"
"""Job comment that marks jobs of dl2pa, because SLURM reuses job numbers."""
LIVE = (
    *("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED"),
    *("REQUEUE_FED", "RESIZING", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT"),
)
"""States of a job that runs or may run later (squeue's manual, job state codes)."""
_QUEUE_FORMAT = "%i|%F|%K|%T|%r|%N|%k"


@dataclass(frozen=True)
class JobState:
    """State of a job in SLURM.

    Args:
        state: SLURM's job state, or `UNKNOWN` if neither the queue nor accounting lists the job.
        reason: why a pending job waits; otherwise empty.
        nodes: node list; empty if no nodes are allocated.
    """

    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def is_live(self) -> bool:
        """Return whether the job runs or may run later."""
        return self.state in LIVE


UNKNOWN = JobState("UNKNOWN")


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Return the state of each job: from the queue, otherwise from accounting, otherwise `UNKNOWN`.

    Raises:
        ConnectionError: SLURM does not answer.
    """
    ids = set(job_ids)
    result = {job: state for job, state in _queued().items() if job in ids} if ids else {}
    missing = ids - set(result)
    result.update({job: state for job, state in _accounted(missing).items() if job in missing})
    return {job: result.get(job, UNKNOWN) for job in ids}


def named(name: str) -> list[str]:
    """Return this user's jobs with a name that run or may run later.

    Raises:
        ConnectionError: SLURM does not answer.
    """
    text = _output(["squeue", "--me", "--noheader", f"--name={name}", "--format=%i"])
    if text is None:
        raise ConnectionError("SLURM does not answer (squeue): it is unknown whether the job was queued")
    return text.split()


def has_accounting() -> bool:
    """Return whether the cluster keeps records of ended jobs."""
    return shutil.which("sacct") is not None and _output(["sacct", "-n", "-X", "-S", "now"]) is not None


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel running and pending jobs at once.

    Raises:
        UserError: SLURM rejects the request.
    """
    done = subprocess.run(["scancel", *job_ids], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = done.stderr.strip() or "cannot be cancelled"
        raise UserError("job", ", ".join(job_ids), message, "See `squeue`.")


def kill_steps(job_ids: Sequence[str], wait_s: float = 5.0) -> None:
    """End the job steps, so that a following cancellation does not send TERM to them; no error if none runs.

    Sends HUP, which ends the launcher and with it all processes. SLURM treats a KILL as a cancellation and sends
    TERM first.
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
    """Return this user's dl2pa jobs in the queue; pending array tasks are listed as `ARRAY_TASK`."""
    text = _output(["squeue", "--me", "--array", "--noheader", "--states=all", f"--format={_QUEUE_FORMAT}"])
    if text is None:
        raise ConnectionError("SLURM does not answer (squeue): the state of the job is unknown")
    result: dict[str, JobState] = {}
    for line in text.splitlines():
        number, array, task, state, reason, nodes, comment = line.split("|", 6)
        if comment.strip() == COMMENT:
            job = f"{array}_{task}" if task.isdigit() else number
            result[job] = JobState(state, reason if state == "PENDING" else "", nodes)
    return result


def _accounted(job_ids: Iterable[str]) -> dict[str, JobState]:
    ids = sorted(job_ids)
    if not ids or shutil.which("sacct") is None:
        return {}
    command = ["sacct", "-n", "-X", "-P", "-o", "JobID,State,NodeList,JobName", "-j", ",".join(ids)]
    result: dict[str, JobState] = {}
    for line in (_output(command) or "").splitlines():
        job, state, nodes, name = line.split("|", 3)
        words = state.split()  # "CANCELLED by 0"
        if name.startswith(f"{COMMENT}-"):
            nodes = "" if nodes == "None assigned" else nodes
            result[job] = JobState(words[0] if words else "UNKNOWN", "", nodes)
    return result


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
