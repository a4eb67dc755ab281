"""Real searches: pruned in one process, and killed and continued by the same command."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna", reason="optuna is not installed")

from dl2pa.commands import search_local
from dl2pa.process import dl2pa_arguments
from dl2pa.search.driver import Driver
from dl2pa.training.trainer import Trainer
from support.commands import run_here
from support.runs import IN_MEMORY, Program, config_with, read_status
from support.waiting import eventually

pytestmark = pytest.mark.xdist_group("runs")
SMALL = {
    "model": {"widths": [4, 8, 16]},
    "method": {"name": "psc", "loss": "cross_entropy", "scale": 14},
    "train": {"epochs": 3},
    "optim": {"warmup_epochs": 0},
    "data": IN_MEMORY,
    "checkpoint": {"every_steps": 0},
}
STEPS = 3 * (1438 // 48)


@pytest.fixture
def command(digits: Path, tmp_path: Path) -> list[Any]:
    """A grid of one good and two useless learning rates."""
    config_with(tmp_path, digits, SMALL)
    search = {
        "config": "small.yaml",
        "parameters": {"optim.lr": {"choice": [0.05, 1e-8, 1e-9]}},
        "sampler": "grid",
        "prune": {"first_epoch": 1},
        "seed": 1,
    }
    (tmp_path / "lr.yaml").write_text(yaml.safe_dump({"search": search}))
    return ["search", tmp_path / "lr.yaml", "--run-dir", tmp_path / "lr", "--json"]


def test_useless_trials_are_stopped_and_can_be_resumed(
    command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials are trained in this process, which compares them after each validation."""
    record, drivers = Trainer._record_evaluation, list[Driver]()

    def record_and_poll(self: Trainer, result: Any) -> bool:
        best = record(self, result)
        drivers[0].poll()
        if self.run_dir.stop_file.exists():
            eventually(lambda: self.stop.requested, "the run sees its stop file")
        return best

    class InProcess(search_local.LocalExecutor):
        """Trains a trial in `wait`, and so one at a time."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.pool.start = self._remember
            self.pool.collect = self._collect
            self._task: Any = None
            self._done: list[tuple[int, int]] = []

        def _remember(self, number: int, task: Any) -> None:
            self._task = number, task

        def has_room(self) -> bool:
            return self._task is None

        def wait(self) -> None:
            number, task = self._task
            done = run_here(*(dl2pa_arguments(task.command) or ()))
            task.log.write_text(done.output + done.error)
            self._task, self._done = None, [(number, done.code)]

        def _collect(self) -> list[tuple[int, int]]:
            done, self._done = self._done, []
            return done

    run = Driver.run
    monkeypatch.setattr(Driver, "run", lambda self: drivers.append(self) or run(self))
    monkeypatch.setattr(Trainer, "_record_evaluation", record_and_poll)
    monkeypatch.setattr(search_local, "LocalExecutor", InProcess)
    done = run_here(*command)
    assert done.code == 0, done.error
    result = done.result
    assert (result["outcome"], result["finished"], result["pruned"]) == ("finished", 1, 2)
    best = result["best"]
    assert best["parameters"] == {"optim.lr": "0.05"} and best["steps"] == STEPS
    assert best["command"].endswith("optim.lr=0.05")
    assert result["steps"] < result["steps_without_pruning"] == 3 * STEPS
    pruned = next(trial for trial in result["trials"] if trial["state"] == "pruned")
    run_dir = Path(pruned["run_dir"])
    assert pruned["epoch"] == 1 and read_status(run_dir)["state"] == "stopped"
    saved = run_dir / "checkpoints" / f"step-{pruned['steps']:09d}" / "COMPLETE"
    assert saved.exists(), "it can be resumed"
    tags = yaml.safe_load((run_dir / "config.yaml").read_text())["tracking"]["tags"]
    parent = json.loads((tmp_path / "lr/events/run.json").read_text())
    assert tags == {
        "search": "lr",
        "trial": str(pruned["trial"]),
        "mlflow.parentRunId": f"@parent@{parent['run_uuid']}@lr",
    }

    again = run_here(*command)
    assert again.code == 0 and again.result == result and "starts" not in again.error
    report = run_here("report", tmp_path / "lr", "--json", "--out", tmp_path / "report")
    assert report.code == 0, report.error
    assert {key: report.result[key] for key in ("best", "trials", "steps")} == {
        key: result[key] for key in ("best", "trials", "steps")
    }
    assert best["command"] in (tmp_path / "report/report.md").read_text()
    assert [row.split()[2] for row in run_here(*command[:-1]).output.splitlines()[1:]].count("pruned") == 2


@pytest.mark.thorough
def test_a_killed_search_ends_as_an_undisturbed_one(
    command: list[Any], tmp_path: Path, program: Program
) -> None:
    """Killed with its trial, twice: at its first step and after its first rung."""
    undisturbed = program.run(*command[:2], "--run-dir", tmp_path / "undisturbed", "--json")
    assert undisturbed.code == 0, undisturbed.error
    moments: Sequence[Callable[[], bool]] = (
        lambda: read_status(tmp_path / "lr/trial-000").get("step", 0) > 0,
        lambda: '"e": "report"' in (tmp_path / "lr/search.jsonl").read_text(),
    )
    for moment in moments:
        search = program.start(*command)
        eventually(
            lambda search=search, moment=moment: moment() or not search.running(), "the moment of the kill"
        )
        assert search.running(), search.error
        os.kill(search.pid, signal.SIGKILL)
        search.wait()
    last = program.run(*command)
    assert last.code == 0, last.error

    def decided(output: dict[str, Any]) -> list[Any]:
        return [
            [t[key] for key in ("parameters", "state", "value", "epoch", "error")] for t in output["trials"]
        ]

    assert decided(last.result) == decided(undisturbed.result)
    assert shlex.split(last.result["best"]["command"])[1] == "train"
