"""What the cluster says about jobs, and how to stop them."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dl2pa.errors import UserError

COMMENT = "dl2pa"
"""By which our jobs are told from others whose number was once one of ours."""
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED")
_QUEUE_FORMAT = "%i|%F|%K|%T|%r|%N|%k"


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


def has_accounting() -> bool:
    """Whether the cluster remembers jobs that have ended."""
    return shutil.which("sacct") is not None and _output(["sacct", "-n", "-X", "-S", "now"]) is not None


def cancel(job_ids: Sequence[str]) -> None:
    """End jobs at once, waiting ones too.

    Raises:
        UserError: SLURM refuses.
    """
    done = subprocess.run(["scancel", *job_ids], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip() or "cannot be cancelled"
        raise UserError("job", ", ".join(job_ids), said, "See `squeue`.")


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
    """This user's jobs of ours in the queue; an array's waiting elements under their own numbers."""
    text = _output(["squeue", "--me", "--array", "--noheader", "--states=all", f"--format={_QUEUE_FORMAT}"])
    if text is None:
        raise ConnectionError("SLURM does not answer (squeue): what became of the job is not known now")
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        number, array, element, state, reason, nodes, comment = line.split("|", 6)
        if comment.strip() == COMMENT:
            job = f"{array}_{element}" if element.isdigit() else number
            found[job] = JobState(state, reason if state == "PENDING" else "", nodes)
    return found


def _accounted(job_ids: Iterable[str]) -> dict[str, JobState]:
    ids = sorted(job_ids)
    if not ids or shutil.which("sacct") is None:
        return {}
    command = ["sacct", "-n", "-X", "-P", "-o", "JobID,State,NodeList,JobName", "-j", ",".join(ids)]
    found: dict[str, JobState] = {}
    for line in (_output(command) or "").splitlines():
        job, state, nodes, name = line.split("|", 3)
        words = state.split()  # "CANCELLED by 0"
        if name.startswith(f"{COMMENT}-"):
            known = "" if nodes == "None assigned" else nodes
            found[job] = JobState(words[0] if words else "UNKNOWN", "", known)
    return found


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
