"""A real SLURM cluster of two nodes on this machine, and jobs submitted to it."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.paths import TESTCLUSTER
from support.runs import processes_of, read_status
from support.waiting import eventually

_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")


def command(*words: object, check: bool = True) -> str:
    """Standard output of a command."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
    return done.stdout


class Cluster:
    """The test cluster, seen through SLURM's own commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`; empty once SLURM has forgotten the job."""
        text = command("scontrol", "show", "job", "-o", job, check=False)
        words = (word.partition("=") for word in text.split())
        return next((value for key, _, value in words if key == name), "")

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def queue(self) -> list[str]:
        return command("squeue", "-h", "-o", "%i").split()

    def release(self, job: str) -> None:
        """Start a requeued job now instead of in two minutes.

        Not within the second of its requeue: SLURM would confuse the new start with the revoked one.
        """
        if self.state(job) != "PENDING" or self.field(job, "Reason") not in ("BeginTime", "None"):
            return
        requeued = datetime.datetime.fromisoformat(self.field(job, "SubmitTime"))
        if datetime.datetime.now() - requeued > datetime.timedelta(seconds=2):
            command("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)

    def wait(self, condition: Callable[[], Any], what: str, job: str | None = None) -> Any:
        """Return the first truthy value of `condition`; a requeued `job` is released meanwhile."""

        def reached() -> Any:
            value = condition()
            if not value and job is not None:
                self.release(job)
            return value

        return eventually(reached, what, poll_s=0.2)

    def is_over(self, job: str) -> bool:
        return self.state(job) in _ENDED

    def finish(self, job: str) -> str:
        """Wait until the job has ended; return its state in accounting."""
        self.wait(lambda: self.is_over(job), f"job {job} ends", job)
        last = ["sacct", "-n", "-X", "-P", "-o", "State", "-j", job]
        self.wait(lambda: command(*last).strip() not in ("", "RUNNING", "PENDING"), f"accounts of {job}")
        return command(*last).split()[0]

    def processes(self, job: str) -> list[str]:
        """Command lines of every process whose environment names the job and this cluster."""
        lines: list[str] = []
        expected = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_CONF={self.folder}/slurm.conf".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if expected <= set((folder / "environ").read_bytes().split(b"\0")):
                    lines.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return lines

    def assert_tidy(self, job: str) -> None:
        """Assert that no process of the job is left and no node was drained."""
        self.wait(lambda: not self.processes(job), f"processes left: {self.processes(job)}")
        nodes = self.wait(
            lambda: [s for s in [command("sinfo", "-h", "-N", "-o", "%T").split()] if "completing" not in s],
            "no node is completing a job",
        )
        assert set(nodes[0]) <= {"idle", "mixed", "allocated"}, nodes

    def stop_node(self, node: str) -> None:
        """Make a node fail; processes of jobs on it keep running."""
        command(TESTCLUSTER, "stop-node", self.folder, node)

    def start_node(self, node: str) -> None:
        command(TESTCLUSTER, "start-node", self.folder, node)


@dataclass(frozen=True)
class Job:
    """A job submitted by `dl2pa submit`."""

    cluster: Cluster
    job: str
    run: Path
    log_file: Path

    @property
    def status(self) -> dict[str, Any]:
        return read_status(self.run)

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        """Wait until the attempt has done `step` steps."""

        def reached() -> bool:
            assert not self.cluster.is_over(self.job), f"ended before step {step}:\n{self.log}"
            status = self.status
            return status.get("attempt", 0) >= attempt and status.get("step", 0) >= step

        self.cluster.wait(reached, f"step {step} of attempt {attempt}:\n{self.log}", self.job)

    def wait_requeued(self) -> None:
        """Wait until the job is pending and none of its processes is left."""
        self.cluster.wait(lambda: self.cluster.state(self.job) == "PENDING", f"requeued:\n{self.log}")
        self.cluster.wait(lambda: not self.cluster.processes(self.job), "the attempt's processes are gone")

    def reach_time_limit(self) -> None:
        """Reduce the time limit to the seconds reserved for saving, and wait until the job is requeued.

        SLURM checks limits every 30 seconds, longer than this run takes, so its ranks are suspended meanwhile.
        """
        processes = processes_of(self.run)
        ranks = [p.pid for p in processes if p.kind == "rank"] or [p.pid for p in processes]
        assert ranks, f"no process of the run is left:\n{self.log}"
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        command("scontrol", "update", f"jobid={self.job}", "TimeLimit=2")
        warnings = self.log.count("stop requested")
        try:
            self.cluster.wait(lambda: self.log.count("stop requested") > warnings, "SLURM warns of the limit")
        finally:
            for pid in ranks:
                os.kill(pid, signal.SIGCONT)
        self.wait_requeued()
        command("scontrol", "update", f"jobid={self.job}", "TimeLimit=5")

    def finish(self) -> str:
        return self.cluster.finish(self.job)

    def starts(self) -> int:
        """Number of starts of the batch script."""
        return self.log.count(", restart ")
