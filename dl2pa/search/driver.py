"""Loop of a search: start trials, follow their validation curves, stop the worse ones, record their outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dl2pa.config.search import Parameter, Search
from dl2pa.errors import UserError
from dl2pa.records import DamagedFile
from dl2pa.rundir import DAMAGED
from dl2pa.runplan import DataFacts, RunPlan
from dl2pa.search.curve import Curve
from dl2pa.search.journal import FAILED, FINISHED, PRUNED, Journal, Trial
from dl2pa.search.optimizer import decide, next_rung, suggest


@dataclass(frozen=True)
class PlannedTrial:
    """A trial with its run.

    Attributes:
        facts: facts of its data set.
    """

    plan: RunPlan
    facts: DataFacts

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.facts.num_train // self.plan.config.train.batch_size)

    @property
    def last_epoch(self) -> int:
        """Epoch of the last validation."""
        train = self.plan.config.train
        limit = train.epochs if train.max_steps is None else math.ceil(train.max_steps / self.steps_per_epoch)
        return min(train.epochs, limit)


Planner = Callable[[Trial], PlannedTrial]
"""Plan the run of a trial, or raise a `UserError` for an invalid combination of parameters."""


class TryLater(Exception):
    """A trial that cannot be started now, for example because the queue is full."""


class SearchRefused(UserError):
    """An error that every further trial would have: it ends the search, and the trial stays open."""


class Executor(Protocol):
    """Where trials are trained: processes of this machine, or SLURM jobs."""

    detached: bool
    """Whether running trials continue when this command ends."""

    @property
    def stopping(self) -> bool:
        """Whether this command was asked to stop."""
        ...

    def state_of(self, trial: Trial, plan: RunPlan) -> str:
        """State of a trial that an earlier command has started: running, finished or failed, or else stopped."""
        ...

    def has_room(self) -> bool:
        """Whether another trial can be started now."""
        ...

    def start(self, trial: Trial, plan: RunPlan) -> None:
        """Start a trial, or continue one that an earlier command has started.

        Raises:
            UserError: its run is refused.
            TryLater: it cannot be started now.
            SearchRefused: no trial can be started.
        """
        ...

    def stop(self, plan: RunPlan) -> None:
        """Ask a running trial to save and end, by its stop file; may be repeated."""
        ...

    def wait(self) -> None:
        """Wait until a trial may have progressed or ended."""
        ...

    def ended(self) -> Sequence[tuple[int, str | None]]:
        """Return the trials that have ended since the last call, with the error of one that failed."""
        ...


@dataclass
class _Running:
    trial: Trial
    planned: PlannedTrial
    curve: Curve


class Driver:
    """Runs a search until its budget of trials is used or the command is stopped.

    Args:
        budget: number of trials.
        planner: see `Planner`.
        on_event: called with a line of text for each start and end.
        on_end: called after a trial has ended.
    """

    def __init__(
        self,
        journal: Journal,
        search: Search,
        space: Sequence[Parameter],
        planner: Planner,
        executor: Executor,
        on_event: Callable[[str], None] = lambda text: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._journal = journal
        self._search = search
        self._space = space
        self._planner = planner
        self._executor = executor
        self._say = on_event
        self._on_end = on_end
        self._running: dict[int, _Running] = {}
        self._waiting: list[_Running] = []
        self.exhausted = False
        """Whether every combination of parameters has been tried before the budget was used."""

    def run(self) -> None:
        """Run the search; returns when no trial is running and none is left to start.

        Raises:
            SearchRefused: no trial can be started; detached trials that run are left alone.
        """
        self._take_up_open_trials()
        while True:
            self._start_trials()
            if self._executor.stopping and (self._executor.detached or not self._running):
                return
            if not self._running and not self._waiting:
                return
            self._executor.wait()
            self.poll()

    def poll(self) -> None:
        """Compare the trials that have reached a rung, and record those that have ended."""
        for running in list(self._running.values()):
            self._judge(running)
        for number, error in self._executor.ended():
            running = self._running.pop(number)
            self._judge(running)
            self._settle(running, error)

    def _take_up_open_trials(self) -> None:
        """Record the trials that ended while no command ran; continue the others before new ones."""
        for trial in self._journal.state.open():
            running = self._plan(trial, new=not trial_folder(self._journal.folder, trial.number).exists())
            if running is None:
                continue
            plan = running.planned.plan
            state = self._executor.state_of(trial, plan)
            self._judge(running)
            if state == "running":
                self._running[trial.number] = running
                if trial.prune:
                    self._executor.stop(plan)
            elif trial.prune or state in ("finished", "failed"):
                self._settle(running, error_of(plan) if state == "failed" else None)
            else:
                self._waiting.append(running)

    def _start_trials(self) -> None:
        while not self._executor.stopping and self._executor.has_room():
            running = self._next()
            if running is None:
                return
            trial, plan = running.trial, running.planned.plan
            try:
                self._executor.start(trial, plan)
            except TryLater as error:
                self._say(f"trial {trial.number} waits: {error}")
                self._waiting.insert(0, running)
                return
            except SearchRefused:
                raise
            except UserError as error:
                self._settle(running, str(error))
                continue
            self._running[trial.number] = running
            self._say(f"trial {trial.number} starts: {plan.title}")

    def _next(self) -> _Running | None:
        """Return the next trial to start; None if there is none."""
        if self._waiting:
            return self._waiting.pop(0)
        trials = self._journal.state.trials
        while len(trials) < self._search.trials:
            suggested = suggest(self._search, self._space, trials)
            if suggested is None:
                self.exhausted = True
                return None
            running = self._plan(self._journal.start(*suggested))
            if running is not None:
                return running
        return None

    def _plan(self, trial: Trial, new: bool = True) -> _Running | None:
        """Plan the run of a trial; None if it is refused, which ends the trial.

        Raises:
            UserError: it is refused although its run exists, for example by another version of dl2pa (not `new`).
        """
        try:
            planned = self._planner(trial)
        except UserError as error:
            if not new:
                raise
            self._end(trial, FAILED, error=str(error))
            return None
        run_dir = planned.plan.run_dir
        return _Running(trial, planned, Curve(run_dir, self._search.metric, planned.steps_per_epoch))

    def _judge(self, running: _Running) -> None:
        """Compare a trial at each rung that it has reached; its last validation is not compared."""
        trial = running.trial
        for epoch, value in self._at_rungs(running):
            prune, attrs = decide(self._search, self._space, self._journal.state.trials, trial, epoch, value)
            self._journal.report(trial, epoch, value, prune=prune, attrs=attrs)
            if prune:
                self._say(
                    f"trial {trial.number} is stopped: {self._search.metric} {value:.2f} % at epoch {epoch}"
                )
                self._executor.stop(running.planned.plan)
                return

    def _at_rungs(self, running: _Running) -> Iterator[tuple[int, float]]:
        trial, last = running.trial, running.planned.last_epoch
        for epoch, value in running.curve.read():
            rung = next_rung(self._search, trial.reports)
            if rung is None or trial.prune:
                return
            if rung <= epoch < last:
                yield epoch, value

    def _settle(self, running: _Running, error: str | None) -> None:
        """Record the outcome of a trial; one that was stopped from outside the search stays open."""
        trial, run = running.trial, running.planned.plan.directory
        status = run.status()
        steps = {"steps": status.get("step"), "total_steps": status.get("total_steps")}
        if trial.prune:
            epoch, value = trial.reports[-1]
            total = running.planned.last_epoch * running.planned.steps_per_epoch
            steps["total_steps"] = status.get("total_steps") or total
            self._end(trial, PRUNED, epoch=epoch, value=value, **steps)
        elif status.get("state") == "finished" and error is None:
            self._finish(running, steps)
        elif error is not None:
            self._end(trial, FAILED, error=error, **steps)
        else:
            self._say(f"trial {trial.number} was stopped; the same command continues it")

    def _finish(self, running: _Running, steps: dict[str, Any]) -> None:
        metric, points = self._search.metric, running.curve.points
        value, error = (points[-1][1], None) if points else (None, None)
        if value is None:
            try:
                result = running.planned.plan.directory.read_result()
                value = result.get(f"{metric}_last", result.get(metric))
            except DamagedFile as damaged:
                error = damaged.problem
        if value is None:
            self._end(running.trial, FAILED, error=error or f"the run has recorded no {metric}", **steps)
            return
        epoch = points[-1][0] if points else running.planned.last_epoch
        self._end(running.trial, FINISHED, value=float(value), epoch=epoch, **steps)

    def _end(self, trial: Trial, state: str, **fields: Any) -> None:
        self._journal.end(trial, state, **fields)
        value = f": {self._search.metric} {trial.value:.2f} %" if trial.value is not None else ""
        self._say(f"trial {trial.number} {state}{value}{f': {trial.error}' if trial.error else ''}")
        self._on_end()


def error_of(plan: RunPlan) -> str:
    """Error of a failed run."""
    status = plan.directory.status()
    text = status.get("error") or "the run has failed"
    return f"{text} ({plan.run_dir.name}/status.json)" if status.get("state") == DAMAGED else str(text)


def trial_folder(folder: Path, number: int) -> Path:
    """Run directory of a trial."""
    return folder / f"trial-{number:03d}"
