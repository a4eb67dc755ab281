"""Search on SLURM: each trial is a job of its own, and the search itself is a small job that submits and stops them.

So the user may log off. The same command shows the progress while that job lives, and continues the search after it.
Every job has a name of its own, by which it is found again: a command that is killed right after sbatch queues nothing
twice.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from dl2pa.commands import cancel, submit
from dl2pa.commands.output import note, say
from dl2pa.commands.search import (
    SearchPlan,
    check_search,
    check_unchanged,
    drive,
    labels,
    plan_ends,
    print_dry_run,
    print_results,
)
from dl2pa.errors import EXIT_DONE, UserError
from dl2pa.ownership import is_owned
from dl2pa.runplan import RunPlan, check_trainings
from dl2pa.search.driver import PlannedTrial, SearchRefused, TryLater, error_of, trial_folder
from dl2pa.search.journal import Journal, State, Trial, is_search, read_state
from dl2pa.search.optimizer import suggest
from dl2pa.tracking.server import choose_uri, local_uri
from launcher import controller, jobs, slurm, submissions
from launcher.refusals import Refusal, kind_of
from launcher.request import Request, check_request
from launcher.sbatch import parse_options
from launcher.submissions import Submission

_POLL_S = 2.0
_QUEUE_POLL_S = 20.0
_RETRY_S = 60.0
_MAX_REFUSALS = 10
"""Maximum number of refusals of sbatch in a row, without those of an outage or a full queue."""
_ENDING_S = 60.0
"""Time for which SLURM is asked often after the record of a run says that it has ended."""
_REFUSED_REMEDY = (
    "Correct the options of sbatch, or ask your administrator, then repeat the command. Running trials continue. Where "
    "compute nodes may not submit jobs, add --here."
)
LOG = "search.log"
T = TypeVar("T")


def run_on_slurm(plan: SearchPlan, args: argparse.Namespace) -> int:
    """Queue the search as a job, or with --here run it in this process."""
    request = submit.request_of(args)
    check_request(request)
    everywhere = argparse.Namespace(**{**vars(args), "run_dir": plan.folder})
    ends = plan_ends(
        plan, lambda specs: submit.plan_jobs(specs, everywhere, in_folder=True, option="search.parameters")
    )
    plan = replace(plan, ends=ends)
    check = partial(submit.check_runs, ends, request)
    if args.here and is_search(plan.folder):  # perhaps the job of the search, which was requeued
        _asking_again(check)
    else:
        check()
    facts = check_trainings([(plan.config, request.nodes * ends[0].nproc)])
    check_search(plan, facts[plan.config.data.model_dump_json()])
    if args.dry_run:
        return print_dry_run(plan, args.json)
    if not args.here:
        return _queue_search(plan, request, args)

    def planner(trial: Trial, tags: dict[str, str]) -> PlannedTrial:
        one = argparse.Namespace(**{**vars(args), "run_dir": trial_folder(plan.folder, trial.number)})
        spec = plan.spec(trial, labels(plan, trial, tags))
        run = submit.plan_jobs([spec], one, in_folder=False, option="search.parameters")[0]
        data = check_trainings([(run.config, request.nodes * run.nproc)])
        return PlannedTrial(run, data[run.config.data.model_dump_json()])

    base = plan.folder.parent
    uri = choose_uri(plan.config.tracking.uri, base)
    executor = ClusterExecutor(plan, request)
    with executor:
        return drive(plan, executor, None if uri == local_uri(base) else uri, planner, args.json)


def _asking_again(call: Callable[[], T], stop: threading.Event | None = None) -> T:
    """Repeat a call while SLURM does not answer.

    Raises:
        ConnectionError: SLURM does not answer, and this command was asked to stop.
    """
    stop = stop or threading.Event()
    while True:
        try:
            return call()
        except ConnectionError as error:
            if stop.is_set():
                raise
            note(f"{error}; asked again in {_RETRY_S:.0f} s")
            stop.wait(_RETRY_S)


class ClusterExecutor:
    """Trains trials as SLURM jobs, which continue when this command ends.

    Args:
        request: resources of each job.
    """

    detached = True

    def __init__(self, plan: SearchPlan, request: Request) -> None:
        self._plan = plan
        self._request = request
        self._jobs: dict[int, tuple[RunPlan, str]] = {}
        self._stop = threading.Event()
        self._states_at = 0.0
        self._retry_at = 0.0
        self._refused: set[int] = set()
        """Trials that sbatch has failed to queue."""
        self._refusals = 0
        self._ended_at: dict[int, float] = {}
        """Time at which the record of a run was first seen to say that it has ended."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> ClusterExecutor:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def has_room(self) -> bool:
        return len(self._jobs) < self._plan.parallel and time.monotonic() >= self._retry_at

    def state_of(self, trial: Trial, plan: RunPlan) -> str:
        job = _asking_again(lambda: self._find_live(trial, plan), self._stop)
        if job is not None:
            self._jobs[trial.number] = (plan, job)
            return "running"
        state = plan.directory.status().get("state")
        return str(state) if state in ("finished", "failed") else "stopped"

    def _find_live(self, trial: Trial, plan: RunPlan) -> str | None:
        """Return the last job of a trial if it runs or may run later."""
        job = self._find(trial, plan)
        return job if job is not None and jobs.states([job])[job].is_live else None

    def _find(self, trial: Trial, plan: RunPlan) -> str | None:
        """Return the last job of a trial: that of its record, or one that was queued without a record."""
        queued = jobs.named(f"dl2pa-{self._name(trial)}")
        unrecorded = [job for job in queued if slurm.is_submitted(job, plan.directory.submission)]
        if unusable := sorted(set(queued) - set(unrecorded)):  # SLURM queued it although sbatch failed
            try:
                jobs.cancel(unusable)
            except UserError as error:
                if kind_of(error.message) is Refusal.OUTAGE:
                    raise ConnectionError(error.message) from None
                note(str(error))  # it has ended meanwhile
        last = submissions.last(plan.run_dir)
        if unrecorded:
            job = max(unrecorded, key=int)  # an earlier one may be completing
            if last is None or last.job_id != job:  # `stop` reads the record
                log = slurm.log_of(job, plan.directory.submission)
                request = self._request.as_dict()
                submissions.write(Submission(job, plan.run_dir, log, request, plan.label, Path.cwd()))
            return job
        return None if last is None else last.job_id

    def _name(self, trial: Trial) -> str:
        return f"{job_name(self._plan.name, read_state(self._plan.folder))}-{trial.number:03d}"

    def start(self, trial: Trial, plan: RunPlan) -> None:
        try:
            if trial.number in self._refused:
                self._cancel_unrecorded(trial)
            submitted = submit.queue([plan], self._request, self._name(trial))
        except (UserError, ConnectionError) as error:
            # The last heartbeat of a process that was killed counts as one of a living process for a minute.
            is_used = isinstance(error, UserError) and error.field == "run-dir" and is_owned(plan.directory)
            if isinstance(error, UserError) and error.field not in ("sbatch", "job") and not is_used:
                raise
            self._retry_at = time.monotonic() + _RETRY_S
            if not is_used:
                self._refused.add(trial.number)
                self._check_refusals(error)
            raise TryLater(str(error)) from None
        self._refused.discard(trial.number)
        self._refusals = 0
        self._jobs[trial.number] = (plan, submitted[0].job_id)

    def _check_refusals(self, error: UserError | ConnectionError) -> None:
        """End the search if sbatch refuses the request itself, or has refused any too often.

        Raises:
            SearchRefused: with the message of sbatch.
        """
        if isinstance(error, ConnectionError) or (kind := kind_of(error.message)).is_temporary:
            return
        self._refusals += 1
        if kind is not Refusal.INVALID and self._refusals < _MAX_REFUSALS:
            return
        times = f"{self._refusals} times in a row" if self._refusals > 1 else "once"
        message = f"refused to queue a trial {times}: {error.message.removeprefix('failed: ')}"
        raise SearchRefused(error.field, error.value, message, _REFUSED_REMEDY) from None

    def _cancel_unrecorded(self, trial: Trial) -> None:
        """Cancel a job that SLURM has queued although sbatch failed, as at its timeout; its files are removed."""
        if queued := jobs.named(f"dl2pa-{self._name(trial)}"):
            jobs.cancel(queued)

    def stop(self, plan: RunPlan) -> None:
        submission = submissions.last(plan.run_dir)
        if submission is None:
            return
        try:
            state = jobs.states([submission.job_id])[submission.job_id]
        except ConnectionError:
            state = jobs.JobState("RUNNING")  # the stop file ends the run without SLURM
        try:
            cancel.end_job(submission, state, now=False)
        except UserError as error:  # it has ended meanwhile; if not, `cancelled` keeps it from starting
            note(str(error))

    def wait(self) -> None:
        self._stop.wait(_POLL_S)

    def ended(self) -> list[tuple[int, str | None]]:
        """Ask SLURM for the jobs, rarely unless the record of a run says that it has ended."""
        if not self._may_have_ended() and time.monotonic() < self._states_at + _QUEUE_POLL_S:
            return []
        try:
            states = jobs.states(job for _, job in self._jobs.values())
        except ConnectionError as error:
            note(f"{error}; asked again")
            return []
        self._states_at = time.monotonic()
        over = [number for number, (_, job) in self._jobs.items() if not states[job].is_live]
        return [(number, self._error(*self._jobs.pop(number), states)) for number in over]

    def _may_have_ended(self) -> bool:
        """Whether the record of a run has recently changed to an end; a stopped run may wait in the queue again."""
        now, ends = time.monotonic(), ("finished", "failed", "stopped")
        ended = [n for n, (plan, _) in self._jobs.items() if plan.directory.status().get("state") in ends]
        self._ended_at = {number: self._ended_at.get(number, now) for number in ended}
        return any(now < since + _ENDING_S for since in self._ended_at.values())

    def _error(self, plan: RunPlan, job: str, states: dict[str, jobs.JobState]) -> str | None:
        state = plan.directory.status().get("state")
        if state in ("finished", "stopped") or plan.directory.cancelled_file.exists():
            return None
        if state == "failed":
            return error_of(plan)
        return f"job {job} ended ({states[job].state}) before the run was finished"


def job_name(name: str, state: State) -> str:
    """Return the name of the job of a search, without the prefix of dl2pa; those of its trials begin with it."""
    assert state.header is not None
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{state.header.id[:8]}"


def _queue_search(plan: SearchPlan, request: Request, args: argparse.Namespace) -> int:
    """Queue the job of the search, unless it is queued already; print its number or the progress."""
    state = read_state(plan.folder) if is_search(plan.folder) else State()
    check_unchanged(plan, state)
    if state.header is None:
        journal = Journal(plan.folder)
        try:
            if journal.state.header is None:
                journal.begin(plan.header())
            state = journal.state
        finally:
            journal.close()
    name = f"dl2pa-{job_name(plan.name, state)}"
    queued = jobs.named(name)
    if queued:
        note(f"the search is job {queued[0]}; its log is {plan.folder / LOG}")
        return print_results(plan.folder, state, False, args.json, is_queued=True)
    has_more = len(state.trials) < plan.search.trials and suggest(plan.search, plan.space, state.trials)
    if not state.open() and not has_more:
        return print_results(plan.folder, state, True, args.json)
    text = controller.script(
        request, name, plan.folder / LOG, _command(), parse_options(args.controller or [])
    )
    slurm.check_with_cluster(text)
    job_id = slurm.submit_script(text)
    fields = {"job_id": job_id, "run_dir": str(plan.folder), "log": str(plan.folder / LOG)}
    say(fields, args.json, "submitted:")
    note("the same command shows the progress, and continues the search if the job ends early")
    return EXIT_DONE


def _command() -> Sequence[str]:
    """Return this command, to run the search in the process of the job."""
    return [sys.executable, "-P", "-u", "-m", "dl2pa", *sys.argv[1:], "--here"]
