"""Trials of a search as SLURM jobs, with a queue in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dl2pa.commands import search_slurm, submit
from dl2pa.commands.search_slurm import ClusterExecutor
from dl2pa.errors import UserError
from dl2pa.rundir import RunDirectory
from dl2pa.search.driver import TryLater
from dl2pa.search.journal import Trial
from launcher import jobs, submissions
from launcher.request import Request


class Queue:
    """Names of the jobs by number, in place of SLURM."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.queries = 0
        self.times_out = False

    def named(self, name: str) -> list[str]:
        return [job for job, its_name in self.jobs.items() if its_name == name]

    def cancel(self, job_ids: Sequence[str]) -> None:
        for job in job_ids:
            del self.jobs[job]

    def states(self, job_ids: Any) -> dict[str, jobs.JobState]:
        self.queries += 1
        return {job: jobs.JobState("PENDING" if job in self.jobs else "COMPLETED") for job in job_ids}

    def queue(self, plans: Sequence[Any], request: Request, name: str) -> list[Any]:
        job = str(len(self.jobs) + 1)
        self.jobs[job] = f"dl2pa-{name}"
        if self.times_out:
            raise UserError("sbatch", name, "failed: timeout", "Try again.")
        return [SimpleNamespace(job_id=job)]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Queue:
    queue = Queue()
    for name in ("named", "cancel", "states"):
        monkeypatch.setattr(jobs, name, getattr(queue, name))
    monkeypatch.setattr(submit, "queue", queue.queue)
    monkeypatch.setattr(search_slurm, "read_state", lambda folder: None)
    monkeypatch.setattr(search_slurm, "job_name", lambda name, state: name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return queue


@pytest.fixture
def executor(slurm: Queue, tmp_path: Path) -> ClusterExecutor:
    plan: Any = SimpleNamespace(name="lr", folder=tmp_path, parallel=2)
    return ClusterExecutor(plan, Request())


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    run = RunDirectory(tmp_path / "trial-000")
    run.create()
    return SimpleNamespace(run_dir=run.root, directory=run, label="lr")


TRIAL = Trial(0, {}, {})


def test_job_that_sbatch_queued_in_spite_of_an_error_is_replaced(
    slurm: Queue, executor: ClusterExecutor, plan: Any
) -> None:
    slurm.times_out = True
    with pytest.raises(TryLater):
        executor.start(TRIAL, plan)
    slurm.times_out = False
    executor.start(TRIAL, plan)
    assert len(slurm.jobs) == 1


def test_job_without_a_record_becomes_the_last_submission(
    slurm: Queue, executor: ClusterExecutor, plan: Any
) -> None:
    """The search was killed right after it had queued a trial that it had queued before."""
    submissions.write(submissions.Submission("9", plan.run_dir))
    slurm.jobs["10"] = "dl2pa-lr-000"
    assert executor.state_of(TRIAL, plan) == "running"
    last = submissions.last(plan.run_dir)
    assert last is not None and last.job_id == "10"


def test_slurm_is_asked_rarely_about_a_stopped_run_in_the_queue(
    slurm: Queue, executor: ClusterExecutor, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    executor.start(TRIAL, plan)
    plan.directory.write_status(state="stopped")
    for _ in range(300):
        now += 2.0
        assert not executor.ended()
    assert 30 <= slurm.queries <= 100
    slurm.jobs.clear()
    now += 20.0
    assert executor.ended() == [(0, None)]
