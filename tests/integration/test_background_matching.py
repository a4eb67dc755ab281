"""Matchings solved beside the training: killed, stopped and continued, they apply the same σ at the same step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS, LAG = 58, 9
LAGGING = {
    "method": {"match": {"early_steps": 13, "early_epochs": 2, "lag_steps": LAG}},
    "train": {"epochs": 2},
    "checkpoint": {"every_steps": 3},
}


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Path:
    """The run directory of a run of 2 processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    program = helpers.Program(folder)
    training = helpers.Training(program, helpers.config_with(folder, digits, LAGGING), folder / "run", 2)
    try:
        training.finish(limit=1)
    finally:
        program.close()
    return training.run


def matchings_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "matchings.jsonl").read_text().splitlines()]


def solvers_of(run: Path, helpers: Any) -> list[int]:
    """The processes that solve for the ranks of a run."""
    ranks = {p.pid for p in helpers.processes_of(run) if p.kind == "rank"}
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if parent in ranks and any(word.endswith("assignment/solve.py") for word in words):
            found.append(int(folder.name))
    return found


def freeze_solver(training: Any, started: Any, helpers: Any) -> int:
    """Stop the next solving process where it is, so that its matching stays under way."""
    found: list[int] = []

    def caught() -> bool:
        found[:] = solvers_of(training.run, helpers)
        return bool(found)

    training.wait_for(started, caught, "a solve in the background")
    os.kill(found[0], signal.SIGSTOP)
    return found[0]


def test_begun_by_the_schedule_applied_so_many_steps_later(undisturbed: Path, helpers: Any) -> None:
    """Begun after steps 13, 26, 39 and 52, and at the end in place of the one of step 52; the first epoch's end, at
    step 29, meets one under way."""
    found = matchings_of(undisturbed)
    assert [(m["step"], m["lag"]) for m in found] == [(22, 9), (35, 9), (48, 9), (58, 0)]
    outcome = helpers.outcome_of(undisturbed)
    assert outcome.result["labels_moved"] == [m["moved"] for m in found]
    assert sum(outcome.result["labels_moved"]) > 10
    sigma = list(range(10))
    for label, old, new in (move for m in found for move in m["moves"]):
        assert sigma[label] == old
        sigma[label] = new
    assert outcome.assignment == sigma, "the σ that was drained last is the one that was saved"
    assert all(m["margin"] is not None for m in found)


def test_what_was_validated_last_is_what_was_saved(undisturbed: Path, program: Any) -> None:
    evaluated = program.run("evaluate", undisturbed, "--json").result
    assert evaluated["top1"] == json.loads((undisturbed / "result.json").read_text())["top1_last"]


def test_struck_while_a_solve_is_under_way(
    undisturbed: Path, train: Callable[..., Any], helpers: Any
) -> None:
    """The run is killed; its successor is asked to stop while all ranks wait for the solve; the third attempt loses
    the solving process."""
    cut = train(2, "cut", LAGGING)

    started = cut.start()
    solver = freeze_solver(cut, started, helpers)
    marker = cut.run / "checkpoints" / "step-000000018" / "COMPLETE"
    cut.wait_for(started, marker.exists, "a checkpoint between step 13 and 22")
    started.signal_group(signal.SIGKILL)
    started.wait()
    cut.assert_gone()
    helpers.eventually(lambda: not Path(f"/proc/{solver}").exists(), "the solver died with its run", 30)
    assert not (cut.run / "matchings.jsonl").exists()

    started = cut.start()
    solver = freeze_solver(cut, started, helpers)
    marker = cut.run / "checkpoints" / "step-000000021" / "COMPLETE"
    cut.wait_for(started, marker.exists, "the last checkpoint before step 22")
    cut.wait_for(started, lambda: waits_at(cut, 22), "the wait at step 22")
    os.kill(started.pid, signal.SIGTERM)
    assert started.wait() == 75, f"a stop does not wait for the solve, which is frozen\n{started.error}"
    cut.assert_gone()
    assert (cut.status["state"], cut.status["step"]) == ("stopped", 22)
    assert not Path(f"/proc/{solver}").exists()

    attempt = cut.status["attempt"]
    started = cut.start()
    cut.wait_for_step(started, 23, attempt)
    first = matchings_of(cut.run)[0]
    assert first == matchings_of(undisturbed)[0]
    os.kill(freeze_solver(cut, started, helpers), signal.SIGKILL)
    assert started.wait() == 0, started.error
    assert "started again" in started.error
    cut.assert_gone()
    helpers.assert_identical(cut.run, undisturbed)


def waits_at(training: Any, step: int) -> bool:
    """Whether `step` steps are logged: with a reading after each, the rank then waits for what is due."""
    return bool(training.status.get("step", 0) >= step)
