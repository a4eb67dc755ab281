"""Trials of a search as SLURM jobs, with a queue in memory."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dl2pa.commands import search_slurm, submit
from dl2pa.commands.search import SearchPlan
from dl2pa.commands.search_slurm import ClusterExecutor
from dl2pa.config import Config
from dl2pa.config.search import Search
from dl2pa.errors import UserError
from dl2pa.rundir import RunDirectory
from dl2pa.search.driver import SearchRefused, TryLater
from dl2pa.search.journal import Trial
from launcher import jobs, submissions
from launcher.request import Request


class Queue:
    """Names of the jobs by number, in place of SLURM."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.queries = 0
        self.times_out = False
        self.refusal = ""
        self.outages = 0

    def named(self, name: str) -> list[str]:
        if self.outages:
            self.outages -= 1
            raise ConnectionError("SLURM does not answer (squeue)")
        return [job for job, its_name in self.jobs.items() if its_name == name]

    def cancel(self, job_ids: Sequence[str]) -> None:
        for job in job_ids:
            del self.jobs[job]

    def states(self, job_ids: Any) -> dict[str, jobs.JobState]:
        self.queries += 1
        return {job: jobs.JobState("PENDING" if job in self.jobs else "COMPLETED") for job in job_ids}

    def queue(self, plans: Sequence[Any], request: Request, name: str) -> list[Any]:
        if self.refusal:
            raise UserError("sbatch", name, f"failed: sbatch: error: {self.refusal}", "Try again.")
        job = str(len(self.jobs) + 1)
        self.jobs[job] = f"dl2pa-{name}"
        if self.times_out:
            raise UserError("sbatch", name, "failed: Socket timed out on send/recv operation", "Try again.")
        write_job_file(plans[0].directory, job)
        return [SimpleNamespace(job_id=job)]


def write_job_file(run: RunDirectory, job: str) -> None:
    """Write the file that submitit gives to a job."""
    run.submission.mkdir(exist_ok=True)
    (run.submission / f"{job}_submitted.pkl").touch()


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
    write_job_file(plan.directory, "10")
    assert executor.state_of(TRIAL, plan) == "running"
    last = submissions.last(plan.run_dir)
    assert last is not None and last.job_id == "10"


def test_job_queued_in_spite_of_an_error_before_a_kill_is_replaced(
    slurm: Queue, executor: ClusterExecutor, plan: Any
) -> None:
    """Its files were removed because sbatch failed, so it cannot train."""
    slurm.times_out = True
    with pytest.raises(TryLater):
        executor.start(TRIAL, plan)
    slurm.times_out = False
    again = ClusterExecutor(executor._plan, Request())  # the search was killed before it tried again
    assert again.state_of(TRIAL, plan) == "stopped" and not slurm.jobs
    assert again.ended() == []
    again.start(TRIAL, plan)
    assert len(slurm.jobs) == 1


def test_a_job_that_ends_before_it_is_replaced_does_not_end_the_search(
    slurm: Queue, executor: ClusterExecutor, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel(job_ids: Sequence[str]) -> None:
        raise UserError("job", ", ".join(job_ids), "Invalid job id specified", "See `squeue`.")

    slurm.jobs["5"] = "dl2pa-lr-000"  # without the files of a job
    monkeypatch.setattr(jobs, "cancel", cancel)
    assert executor.state_of(TRIAL, plan) == "stopped"


def test_a_job_that_may_run_is_cancelled_before_its_trial_continues(
    slurm: Queue, executor: ClusterExecutor, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[str] = []

    def cancel(job_ids: Sequence[str]) -> None:
        cancelled.extend(job_ids)
        if len(cancelled) == 1:
            message = "Unable to contact slurm controller (connect failure)"
            raise UserError("job", job_ids[0], message, "See `squeue`.")

    slurm.jobs["5"] = "dl2pa-lr-000"  # without the files of a job
    monkeypatch.setattr(search_slurm, "_RETRY_S", 0.0)
    monkeypatch.setattr(jobs, "cancel", cancel)
    assert executor.state_of(TRIAL, plan) == "stopped"
    assert cancelled == ["5", "5"]


def test_search_ends_at_once_if_sbatch_refuses_the_request(
    slurm: Queue, executor: ClusterExecutor, plan: Any
) -> None:
    slurm.refusal = "Batch job submission failed: Invalid account or account/partition combination specified"
    with pytest.raises(SearchRefused, match=rf"{slurm.refusal}.*repeat the command"):
        executor.start(TRIAL, plan)


def test_search_ends_after_ten_refusals_in_a_row(slurm: Queue, executor: ClusterExecutor, plan: Any) -> None:
    def refuse(times: int) -> None:
        slurm.refusal = "lua: the budget of this project is used up"
        for _ in range(times):
            with pytest.raises(TryLater, match="budget"):
                executor.start(TRIAL, plan)

    refuse(9)
    slurm.refusal = ""
    executor.start(TRIAL, plan)
    refuse(9)
    with pytest.raises(SearchRefused, match="10 times in a row: sbatch: error: lua: the budget"):
        executor.start(TRIAL, plan)


@pytest.mark.parametrize(
    "refusal",
    [
        "Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "Batch job submission failed: Socket timed out on send/recv operation",
        "QOSMaxSubmitJobPerUserLimit",
    ],
)
def test_search_waits_as_long_as_slurm_does_not_answer_or_the_queue_is_full(
    slurm: Queue, executor: ClusterExecutor, plan: Any, refusal: str
) -> None:
    slurm.refusal = refusal
    for _ in range(50):
        with pytest.raises(TryLater):
            executor.start(TRIAL, plan)


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


def test_trial_in_the_directory_of_a_process_that_may_be_alive_waits(
    slurm: Queue, executor: ClusterExecutor, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was killed on another node less than a minute ago."""
    plan.directory.write_status(state="running", attempt=1)
    owner = {"host": "node9", "pid": 1, "id": "x", "launch": "7.0", "machine": "another", "start": 1}
    plan.directory.owner_file.write_text(json.dumps(owner))

    def refuse(plans: Sequence[Any], request: Request, name: str) -> list[Any]:
        raise UserError("run-dir", str(plan.run_dir), "a process is training in it", "Wait for it.")

    with monkeypatch.context() as refusing:
        refusing.setattr(submit, "queue", refuse)
        for _ in range(20):
            with pytest.raises(TryLater, match="a process is training in it"):
                executor.start(TRIAL, plan)
        plan.directory.owner_file.unlink()
        with pytest.raises(UserError, match="a process is training in it"):
            executor.start(TRIAL, plan)
    executor.start(TRIAL, plan)
    assert len(slurm.jobs) == 1


def test_search_continues_after_an_outage_at_its_start(
    slurm: Queue, executor: ClusterExecutor, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_slurm, "_RETRY_S", 0.0)
    submissions.write(submissions.Submission("9", plan.run_dir))
    slurm.jobs["9"] = "dl2pa-lr-000"
    write_job_file(plan.directory, "9")
    slurm.outages = 3
    assert executor.state_of(TRIAL, plan) == "running"
    assert slurm.outages == 0
    executor._stop.set()
    slurm.outages = 1
    with pytest.raises(ConnectionError):
        executor.state_of(TRIAL, plan)


@pytest.mark.parametrize("begun", [True, False])
def test_job_of_a_search_waits_for_slurm_to_check_its_request(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first command of a search, which a user waits for, fails at once."""
    end: Any = SimpleNamespace(config=Config(), nproc=1)
    answers: list[Exception | None] = [ConnectionError("no answer"), ConnectionError("no answer"), None]

    def check_runs(plans: Any, request: Request) -> None:
        if error := answers.pop(0):
            raise error

    data = end.config.data.model_dump_json()
    for name, value in {
        **{"_RETRY_S": 0.0, "check_request": lambda request: None, "plan_ends": lambda plan, planned: (end,)},
        **{"check_trainings": lambda trainings: {data: None}, "check_search": lambda plan, facts: None},
        **{"is_search": lambda folder: begun, "choose_uri": lambda uri, base: None},
        "drive": lambda *arguments: 7,
    }.items():
        monkeypatch.setattr(search_slurm, name, value)
    monkeypatch.setattr(submit, "request_of", lambda args: Request())
    monkeypatch.setattr(submit, "check_runs", check_runs)
    search = SearchPlan("lr", Search(), [], tmp_path / "c.yaml", (), tmp_path)
    args = argparse.Namespace(here=True, dry_run=False, json=False, run_dir=None)
    if begun:
        assert search_slurm.run_on_slurm(search, args) == 7 and not answers
    else:
        with pytest.raises(ConnectionError):
            search_slurm.run_on_slurm(search, args)
