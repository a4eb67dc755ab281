"""Background matching: runs that are killed, stopped and resumed apply the same assignment at the same step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.commands import run_here
from support.runs import IN_MEMORY, STOPPED, Started, Training, assert_identical, outcome_of, processes_of
from support.waiting import eventually

pytestmark = pytest.mark.xdist_group("runs")
LAG = 9
LAGGING = {
    "data": IN_MEMORY,
    "method": {"match": {"early_steps": 13, "early_epochs": 2, "lag_steps": LAG}},
    "train": {"epochs": 2},
    "checkpoint": {"every_steps": 3},
}


def matchings_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "matchings.jsonl").read_text().splitlines()]


def solvers_of(run: Path) -> list[int]:
    """The processes that solve assignments for a run."""
    parents = {p.pid for p in processes_of(run)}
    solvers: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if parent in parents and any(word.endswith("assignment/solve.py") for word in words):
            solvers.append(int(folder.name))
    return solvers


def freeze_solver(training: Training, started: Started) -> int:
    """Suspend the next solver process, so that its matching does not end; returns its pid."""
    solvers: list[int] = []

    def caught() -> bool:
        solvers[:] = solvers_of(training.run)
        return bool(solvers)

    training.wait_for(started, caught, "a solve in the background")
    os.kill(solvers[0], signal.SIGSTOP)
    return solvers[0]


def test_applied_a_fixed_number_of_steps_after_it_began(undisturbed: Callable[..., Training]) -> None:
    """Begun after steps 13, 26, 39 and 52; the end of the first epoch, at step 29, meets one that is pending."""
    training = undisturbed(1, LAGGING)
    matchings = matchings_of(training.run)
    assert [(m["step"], m["lag"]) for m in matchings] == [(22, 9), (35, 9), (48, 9), (58, 0)]
    outcome = outcome_of(training.run)
    assert outcome.result["labels_moved"] == [m["moved"] for m in matchings]
    assert sum(outcome.result["labels_moved"]) > 10
    sigma = list(range(10))
    for label, old, new in (move for m in matchings for move in m["moves"]):
        assert sigma[label] == old
        sigma[label] = new
    assert outcome.assignment == sigma, "the last assignment is the one that was saved"
    assert all(m["margin"] is not None for m in matchings)
    evaluated = run_here("evaluate", training.run, "--json").result
    assert evaluated["top1"] == outcome.result["top1_last"], "the saved assignment is the validated one"


@pytest.mark.thorough
@pytest.mark.parametrize("nproc", [1, 2])
def test_interrupted_while_a_solve_is_pending(
    nproc: int, undisturbed: Callable[..., Training], train: Callable[..., Training]
) -> None:
    """Killed; then asked to stop while all ranks wait for the solve; then the solver process is killed."""
    cut = train(nproc, "cut", LAGGING)
    reference = undisturbed(nproc, LAGGING).run

    started = cut.start()
    solver = freeze_solver(cut, started)
    marker = cut.run / "checkpoints" / "step-000000018" / "COMPLETE"
    cut.wait_for(started, marker.exists, "a checkpoint between step 13 and 22")
    started.signal_group(signal.SIGKILL)
    started.wait()
    cut.assert_gone()
    eventually(lambda: not Path(f"/proc/{solver}").exists(), "the solver died with its run", 30)
    assert not (cut.run / "matchings.jsonl").exists()

    started = cut.start()
    solver = freeze_solver(cut, started)
    marker = cut.run / "checkpoints" / "step-000000021" / "COMPLETE"
    cut.wait_for(started, marker.exists, "the last checkpoint before step 22")
    # Every step is logged: once step 22 is, the rank waits for the assignment that is due.
    cut.wait_for(started, lambda: cut.status.get("step", 0) >= 22, "the wait at step 22")
    os.kill(started.pid, signal.SIGTERM)
    assert started.wait() == STOPPED, f"a stop does not wait for the frozen solver\n{started.error}"
    cut.assert_gone()
    assert (cut.status["state"], cut.status["step"]) == ("stopped", 22)
    assert not Path(f"/proc/{solver}").exists()

    attempt = cut.status["attempt"]
    started = cut.start()
    cut.wait_for_step(started, 23, attempt)
    assert matchings_of(cut.run)[0] == matchings_of(reference)[0]
    os.kill(freeze_solver(cut, started), signal.SIGKILL)
    done = started.completed()
    assert done.code == 0, done.error
    assert "started again" in done.error
    cut.assert_gone()
    assert_identical(cut.run, reference)
