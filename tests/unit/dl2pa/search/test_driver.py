"""A search with simulated trainings: sampler, pruning, failures, and kills at every decision."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna", reason="optuna is not installed")

from dl2pa.config.search import Search
from dl2pa.errors import UserError
from dl2pa.rundir import RunDirectory
from dl2pa.runplan import DataFacts, RunPlan, RunSpec, plan_runs
from dl2pa.search.driver import Driver, PlannedTrial, SearchRefused, TryLater, trial_folder
from dl2pa.search.journal import Header, Journal, State, Trial, read_state
from dl2pa.search.optimizer import suggest
from dl2pa.search.results import overrides_of
from dl2pa.tracking.spool import Spool

EPOCHS, STEPS = 4, 10
CONFIG: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [80, 20], "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
    "train": {"epochs": EPOCHS, "batch_size": 8},
}
SEARCH = Search(config="small.yaml", parameters={"optim.lr": {"log_uniform": [0.01, 1]}}, trials=8)


class Killed(BaseException):
    """The end of a process by SIGKILL."""


class Simulated:
    """Runs that write the files of real ones; each `wait` is one epoch. They end with their command.

    Args:
        parallel: number of concurrent trials.
        failing: number of a trial that fails in its third epoch.
    """

    detached = False
    stopping = False

    def __init__(self, parallel: int = 1, failing: int | None = None) -> None:
        self._parallel = parallel
        self._failing = failing
        self._plans: dict[int, RunPlan] = {}
        self._lr: dict[int, float] = {}
        self.starts: list[int] = []

    def has_room(self) -> bool:
        return len(self._plans) < self._parallel

    def state_of(self, trial: Trial, plan: RunPlan) -> str:
        state = plan.directory.status().get("state")
        return state if state in ("finished", "failed") else "stopped"

    def start(self, trial: Trial, plan: RunPlan) -> None:
        plan.directory.create()
        plan.directory.stop_file.unlink(missing_ok=True)
        plan.directory.write_status(state="running", total_steps=EPOCHS * STEPS)
        self._plans[trial.number] = plan
        self._lr[trial.number] = trial.params["optim.lr"]
        self.starts.append(trial.number)

    def stop(self, plan: RunPlan) -> None:
        plan.directory.stop_file.touch()

    def wait(self) -> None:
        for number, plan in self._plans.items():
            self._train_epoch(number, plan.directory)

    def _train_epoch(self, number: int, run: RunDirectory) -> None:
        if run.stop_file.exists():
            run.write_status(state="stopped")
            return
        epoch = int(run.status().get("step", 0)) // STEPS + 1
        if number == self._failing and epoch == 3:
            run.write_status(state="failed", error="the loss is not finite")
            return
        top1 = 90.0 - 20 * abs(math.log10(self._lr[number] / 0.2)) - 30 / epoch
        spool = Spool(run.root, 1)
        spool.metrics(epoch * STEPS, {"val/top1": top1, "val/ece": 5.0})
        spool.close()
        run.write_status(state="finished" if epoch == EPOCHS else "running", step=epoch * STEPS)

    def ended(self) -> list[tuple[int, str | None]]:
        result: list[tuple[int, str | None]] = []
        for number, plan in list(self._plans.items()):
            status = plan.directory.status()
            if status["state"] != "running":
                del self._plans[number]
                result.append((number, status.get("error")))
        return result


@pytest.fixture
def planner(tmp_path: Path) -> Callable[[Trial], PlannedTrial]:
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(CONFIG))

    def plan(trial: Trial) -> PlannedTrial:
        spec = RunSpec(config, tuple(overrides_of(SEARCH.space(), trial)))
        (run,) = plan_runs([spec], trial_folder(tmp_path / "search", trial.number))
        return PlannedTrial(run, DataFacts({}, 80, 10))

    return plan


@pytest.fixture
def searched(tmp_path: Path, planner: Callable[[Trial], PlannedTrial]) -> Callable[..., Simulated]:
    """Run the command of a search once: ``searched(search, executor)``."""

    def run(search: Search = SEARCH, executor: Simulated | None = None) -> Simulated:
        executor = executor or Simulated()
        journal = Journal(tmp_path / "search")
        try:
            if journal.state.header is None:
                keys = {"parameters": search.parameters}
                journal.begin(Header("0" * 32, "lr", "small.yaml", (), "", keys))
            Driver(journal, search, search.space(), planner, executor).run()
        finally:
            journal.close()
        return executor

    return run


def decisions(folder: Path) -> list[Trial]:
    """What a search decided; the number of steps of a killed run can differ."""
    trials = read_state(folder / "search").trials
    for trial in trials:
        trial.steps = None if trial.state == "pruned" else trial.steps
    return trials


def test_worse_trials_are_stopped_at_the_rungs(searched: Callable[..., Simulated], tmp_path: Path) -> None:
    searched()
    state = read_state(tmp_path / "search")
    counts = state.counts()
    assert counts["finished"] + counts["pruned"] == 8 and min(counts["finished"], counts["pruned"]) > 1
    assert all(0.01 <= trial.params["optim.lr"] <= 1 for trial in state.trials)
    for trial in state.trials:
        assert [epoch for epoch, _ in trial.reports] == [1, 3][: len(trial.reports)]
        status = RunDirectory(trial_folder(tmp_path / "search", trial.number)).status()
        assert status["state"] == ("stopped" if trial.state == "pruned" else "finished")
        if trial.state == "pruned":
            rung, value = trial.reports[-1]
            earlier = state.trials[: trial.number]
            rivals = [v for other in earlier for epoch, v in other.reports if epoch == rung]
            assert (trial.epoch, trial.value) == (rung, value)
            kept = max(1, (len(rivals) + 1) // 3)
            assert sorted([*rivals, value], reverse=True).index(value) >= kept, "not among the best third"
    best = state.best(maximize=True)
    assert best is not None and best.value == max(t.value or 0 for t in state.trials if t.state == "finished")


def test_without_pruning_every_trial_is_trained(searched: Callable[..., Simulated], tmp_path: Path) -> None:
    prune = SEARCH.prune.model_copy(update={"enabled": False})
    searched(SEARCH.model_copy(update={"prune": prune, "trials": 3}))
    assert [t.steps for t in read_state(tmp_path / "search").trials] == [EPOCHS * STEPS] * 3


def kill_before_or_after(monkeypatch: pytest.MonkeyPatch, at: int, *, written: bool) -> None:
    """Kill the command at a line of the journal, before or after it is written."""
    append, lines = Journal._append, 0

    def killing(self: Journal, event: dict[str, Any]) -> None:
        nonlocal lines
        lines += 1
        if lines == at and not written:
            raise Killed
        append(self, event)
        if lines == at:
            raise Killed

    monkeypatch.setattr(Journal, "_append", killing)


def test_a_search_killed_at_any_decision_continues_as_if_it_had_not_been(
    searched: Callable[..., Simulated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = SEARCH.model_copy(update={"trials": 2, "seed": 1})
    searched(few)
    expected = decisions(tmp_path)
    lines = len((tmp_path / "search/search.jsonl").read_text().splitlines())
    assert {trial.state for trial in expected} == {"finished", "pruned"}
    for at in range(2, lines + 1):
        for written in (False, True):
            shutil.rmtree(tmp_path / "search")
            with monkeypatch.context() as patch:
                kill_before_or_after(patch, at, written=written)
                with pytest.raises(Killed):
                    searched(few)
            searched(few)
            assert decisions(tmp_path) == expected, (at, written)
            assert len((tmp_path / "search/search.jsonl").read_text().splitlines()) == lines


def test_a_search_killed_during_training_continues_the_trial(
    searched: Callable[..., Simulated], tmp_path: Path
) -> None:
    class Dying(Simulated):
        epochs = 0

        def wait(self) -> None:
            super().wait()
            self.epochs += 1
            if self.epochs == 6:
                raise Killed

    with pytest.raises(Killed):
        searched(executor=Dying())
    killed = searched()
    continued = decisions(tmp_path)
    assert killed.starts == [1, 2, 3, 4, 5, 6, 7]
    shutil.rmtree(tmp_path / "search")
    searched()
    assert decisions(tmp_path) == continued


def test_a_failed_trial_is_recorded_and_the_search_goes_on(
    searched: Callable[..., Simulated], tmp_path: Path
) -> None:
    searched(executor=Simulated(failing=0))
    state = read_state(tmp_path / "search")
    first = state.trials[0]
    assert (first.state, first.error, first.steps) == ("failed", "the loss is not finite", 20)
    assert state.counts()["open"] == 0 and len(state.trials) == 8
    again = searched()
    assert again.starts == [], "nothing is repeated"


def test_a_trial_that_somebody_stops_continues_with_the_next_command(
    searched: Callable[..., Simulated], tmp_path: Path
) -> None:
    class Stopped(Simulated):
        def wait(self) -> None:
            super().wait()
            if 0 in self._plans and self._plans[0].directory.status()["step"] == 2 * STEPS:
                self._plans[0].directory.stop_file.touch()

    searched(executor=Stopped())
    state = read_state(tmp_path / "search")
    assert [trial.number for trial in state.open()] == [0] and len(state.trials) == 8
    assert searched().starts == [0]
    first = read_state(tmp_path / "search").trials[0]
    assert first.state != "open" and (first.steps or 0) > 2 * STEPS


def test_concurrent_trials_use_the_budget_once(searched: Callable[..., Simulated], tmp_path: Path) -> None:
    executor = searched(executor=Simulated(parallel=3))
    assert executor.starts == list(range(8))
    assert len({trial.params["optim.lr"] for trial in read_state(tmp_path / "search").trials}) == 8


def test_a_larger_budget_continues_a_search(searched: Callable[..., Simulated], tmp_path: Path) -> None:
    searched(SEARCH.model_copy(update={"trials": 3}))
    first = decisions(tmp_path)
    assert searched().starts == [3, 4, 5, 6, 7]
    assert decisions(tmp_path)[:3] == first


def test_a_trial_that_cannot_be_queued_waits(searched: Callable[..., Simulated], tmp_path: Path) -> None:
    class Full(Simulated):
        refusals = 2

        def start(self, trial: Trial, plan: RunPlan) -> None:
            if self.refusals:
                self.refusals -= 1
                raise TryLater("the queue is full")
            super().start(trial, plan)

    executor = searched(SEARCH.model_copy(update={"trials": 2}), Full())
    assert executor.starts == [0, 1]


def test_a_search_that_the_cluster_refuses_ends_and_continues_later(
    searched: Callable[..., Simulated], tmp_path: Path
) -> None:
    class Refusing(Simulated):
        detached = True
        stopped = 0

        def start(self, trial: Trial, plan: RunPlan) -> None:
            if trial.number == 2:
                raise SearchRefused("sbatch", "x", "refused", "Repeat the command.")
            super().start(trial, plan)

        def stop(self, plan: RunPlan) -> None:
            self.stopped += 1

    refused, search = Refusing(parallel=3), SEARCH.model_copy(update={"trials": 4})
    with pytest.raises(SearchRefused):
        searched(search, refused)
    assert read_state(tmp_path / "search").counts()["open"] == 3 and refused.stopped == 0
    assert searched(search).starts == [0, 1, 2, 3]


def test_an_invalid_combination_fails_and_the_search_goes_on(
    searched: Callable[..., Simulated], tmp_path: Path
) -> None:
    class Refusing(Simulated):
        def start(self, trial: Trial, plan: RunPlan) -> None:
            if trial.number == 1:
                raise UserError("optim.lr", trial.params["optim.lr"], "does not fit", "Give another.")
            super().start(trial, plan)

    searched(executor=Refusing())
    state = read_state(tmp_path / "search")
    assert state.trials[1].state == "failed" and "does not fit" in str(state.trials[1].error)
    assert state.counts()["failed"] == 1 and len(state.trials) == 8


def test_the_sampler_depends_only_on_the_journal() -> None:
    def sampled(search: Search) -> list[dict[str, Any]]:
        state = State()
        state.apply({"e": "search", **vars(Header("0" * 32, "", "", (), "", {}))})
        for number in range(14):
            suggested = suggest(search, search.space(), state.trials)
            assert suggested is not None
            params, attrs = suggested
            state.apply({"e": "trial", "number": number, "params": params, "attrs": attrs})
            value = 90.0 - 20 * abs(math.log10(params["optim.lr"] / 0.2))
            state.apply({"e": "end", "number": number, "state": "finished", "value": value})
        return [trial.params for trial in state.trials]

    first = sampled(SEARCH)
    assert sampled(SEARCH) == first
    assert sampled(SEARCH.model_copy(update={"seed": 1})) != first
    assert sampled(SEARCH.model_copy(update={"sampler": "random"}))[10:] != first[10:], "TPE learns"
    assert all(float(f"{params['optim.lr']:.4g}") == params["optim.lr"] for params in first)


@pytest.mark.parametrize("sampler", ["grid", "tpe", "random"])
def test_no_combination_is_tried_twice(
    sampler: str, searched: Callable[..., Simulated], tmp_path: Path
) -> None:
    parameters = {
        "optim.lr": {"choice": [0.1, 0.2]},
        "method.loss": {"choice": ["cross_entropy", "dot_regression"]},
    }
    search = SEARCH.model_copy(update={"parameters": parameters, "sampler": sampler, "trials": 10})
    space, trials = search.space(), list[Trial]()
    while (suggested := suggest(search, space, trials)) is not None:
        trials.append(Trial(len(trials), *suggested, state="failed"))
    assert len(trials) == 4
    assert len({(t.params["optim.lr"], t.params["method.loss"]) for t in trials}) == 4


@pytest.mark.parametrize("started", [False, True])
def test_an_open_trial_that_is_refused_fails_only_without_a_run(started: bool, tmp_path: Path) -> None:
    def refuse(trial: Trial) -> PlannedTrial:
        raise UserError("optim.lr", 1, "is refused by this version", "Use another.")

    journal = Journal(tmp_path / "search")
    journal.begin(Header("0" * 32, "lr", "small.yaml", (), "", {"parameters": SEARCH.parameters}))
    suggested = suggest(SEARCH, SEARCH.space(), [])
    assert suggested is not None
    trial = journal.start(*suggested)
    if started:
        trial_folder(journal.folder, trial.number).mkdir()
    search = SEARCH.model_copy(update={"trials": 1})
    driver = Driver(journal, search, search.space(), refuse, Simulated())
    if started:
        with pytest.raises(UserError, match="refused by this version"):
            driver.run()
    else:
        driver.run()
    journal.close()
    assert [t.state for t in read_state(journal.folder).trials] == ["open" if started else "failed"]
