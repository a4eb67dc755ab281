"""A real SLURM of two nodes on this machine, and runs submitted to it as people submit them."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
TESTCLUSTER = REPOSITORY / "slurm/testcluster"
CANNOT_BE_HAD = 3
DEADLINE_S = 480.0


def command(*words: object, check: bool = True) -> str:
    """Standard output of a command."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
    return done.stdout


class Cluster:
    """The test cluster, and what its tools say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`; empty once SLURM has forgotten the job."""
        text = command("scontrol", "show", "job", "-o", job, check=False)
        words = (word.partition("=") for word in text.split())
        return next((value for key, _, value in words if key == name), "")

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def release(self, job: str) -> None:
        """Let a requeued job start now instead of in two minutes.

        Not within the second of its requeue: SLURM would take the new start for the one it has just revoked.
        """
        if self.state(job) != "PENDING" or self.field(job, "Reason") not in ("BeginTime", "None"):
            return
        requeued = datetime.datetime.fromisoformat(self.field(job, "SubmitTime"))
        if datetime.datetime.now() - requeued > datetime.timedelta(seconds=2):
            command("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)

    def wait(self, condition: Callable[[], Any], what: str, job: str | None = None) -> Any:
        """The first truthy value of `condition`, a requeued `job` being let start meanwhile."""
        deadline = time.monotonic() + DEADLINE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s in vain: {what}"
            if job is not None:
                self.release(job)
            time.sleep(0.2)
        return value

    def is_over(self, job: str) -> bool:
        return self.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")

    def finish(self, job: str) -> str:
        """Wait until the job has ended for good; returns the state that accounting gives it."""
        self.wait(lambda: self.is_over(job), f"job {job} ends", job)
        last = ["sacct", "-n", "-X", "-P", "-o", "State", "-j", job]
        self.wait(lambda: command(*last).strip() not in ("", "RUNNING", "PENDING"), f"accounts of {job}")
        return command(*last).split()[0]

    def processes(self, job: str) -> list[str]:
        """Command lines of everything that runs with the job's number, of this cluster, in its environment."""
        found: list[str] = []
        ours = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_CONF={self.folder}/slurm.conf".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if ours <= set((folder / "environ").read_bytes().split(b"\0")):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def assert_tidy(self, job: str) -> None:
        """Nothing of the job runs any more, and no node was drained."""
        self.wait(lambda: not self.processes(job), f"processes left: {self.processes(job)}")
        nodes = self.wait(
            lambda: [s for s in [command("sinfo", "-h", "-N", "-o", "%T").split()] if "completing" not in s],
            "no node completes a job",
        )
        assert set(nodes[0]) <= {"idle", "mixed", "allocated"}, nodes


@dataclass(frozen=True)
class Submitted:
    """A job of the program's."""

    cluster: Cluster
    job: str
    run: Path
    log_file: Path
    helpers: Any

    @property
    def status(self) -> dict[str, Any]:
        try:
            return json.loads((self.run / "status.json").read_text())
        except FileNotFoundError:
            return {}

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

    def reach_time_limit(self) -> None:
        """Move the limit to where only the seconds reserved for saving are left, until the job is requeued.

        SLURM looks at limits every half minute, which this short run would not live to see: it is held meanwhile.
        """
        ranks = [p.pid for p in self.helpers.processes_of(self.run) if p.kind == "rank"]
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        command("scontrol", "update", f"jobid={self.job}", "TimeLimit=2")
        try:
            self.cluster.wait(lambda: "asked to stop" in self.log, "SLURM warns of the limit")
        finally:
            for pid in ranks:
                os.kill(pid, signal.SIGCONT)
        self.cluster.wait(lambda: self.cluster.state(self.job) == "PENDING", f"requeued:\n{self.log}")
        command("scontrol", "update", f"jobid={self.job}", "TimeLimit=5")

    def finish(self) -> str:
        return self.cluster.finish(self.job)

    def starts(self) -> int:
        """How often the batch script began."""
        return self.log.count("dl2pa: start ")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Started once; a cluster that runs already is used where DL2PA_TEST_CLUSTER names its folder."""
    given = os.environ.get("DL2PA_TEST_CLUSTER")
    folder = Path(given or tempfile.mkdtemp(prefix="dl2pa-slurm-"))
    folder.chmod(0o755)
    done = subprocess.run([TESTCLUSTER, "up", folder], capture_output=True, text=True, check=False)
    if done.returncode == CANNOT_BE_HAD:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"no test cluster here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    old = {name: os.environ.get(name) for name in ("SLURM_CONF", "XDG_STATE_HOME")}
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    yield Cluster(folder)
    for name, value in old.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if given is None:
        command(TESTCLUSTER, "down", folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def dl2pa(cluster: Cluster, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the program and wait for it."""

    def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dl2pa", *(str(a) for a in arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env},
        )

    return run


@pytest.fixture
def cancelled_afterwards(cluster: Cluster) -> Iterator[list[str]]:
    """Append a job's number, and nothing of it is left to the tests that follow, whatever came of this one."""
    jobs: list[str] = []
    yield jobs
    for job in jobs:
        command("scancel", job, check=False)
    for job in jobs:
        cluster.wait(lambda job=job: cluster.is_over(job), f"job {job} is gone")


@pytest.fixture
def submit(
    cluster: Cluster,
    dl2pa: Any,
    digits: Path,
    tmp_path: Path,
    helpers: Any,
    cancelled_afterwards: list[str],
) -> Callable[..., Submitted]:
    """Submit the small configuration: ``submit({section: {key: value}}, "--time=5")``; two nodes, two processes."""

    def make(changes: Mapping[str, Any] | None = None, *options: str, name: str = "run") -> Submitted:
        config = helpers.config_with(tmp_path / f"config-{name}", digits, changes)
        places = ["--nodes=2", "--gpus-per-node=2", "--run-dir", tmp_path / "runs" / name, "--json"]
        done = dl2pa("submit", config, *places, *options)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        cancelled_afterwards.append(told["job_id"])
        return Submitted(cluster, told["job_id"], Path(told["run_dir"]), Path(told["log"]), helpers)

    return make
