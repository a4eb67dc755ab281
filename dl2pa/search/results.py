"""Results of a search: its trials, the best one and the command that trains it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dl2pa.config.search import Parameter, space_of
from dl2pa.errors import UserError
from dl2pa.rundir import RunDirectory
from dl2pa.search.driver import trial_folder
from dl2pa.search.journal import JOURNAL, OPEN, Header, State, Trial, is_search, read_state


def load_search_results(folder: Path) -> dict[str, Any]:
    """Return the results of the search in a folder; see `results_of`.

    Raises:
        UserError: the folder contains no search, or its journal is damaged.
    """
    if not is_search(folder):
        raise UserError("run", str(folder), f"contains no {JOURNAL}", "Give the folder of a `dl2pa search`.")
    return results_of(folder, read_state(folder))


def results_of(folder: Path, state: State) -> dict[str, Any]:
    """Return the results of a search as a JSON object: the trials in order, the best one, steps and commands."""
    header = state.header
    if header is None:
        raise UserError("run", str(folder), "the search has not begun", "Repeat its `dl2pa search` command.")
    space, maximize = space_of(dict(header.keys["parameters"])), bool(header.keys["maximize"])
    trials = [_trial(folder, header, space, trial) for trial in state.trials]
    best = state.best(maximize=maximize)
    totals = [trial["total_steps"] for trial in trials if trial["total_steps"] is not None]
    return {
        "search": header.name,
        "run_dir": str(folder),
        "metric": header.keys["metric"],
        "direction": "maximize" if maximize else "minimize",
        **state.counts(),
        "best": None if best is None else trials[best.number],
        "steps": sum(trial["steps"] or 0 for trial in trials),
        "steps_without_pruning": sum(totals) if len(totals) == len(trials) else None,
        "trials": trials,
    }


def _trial(folder: Path, header: Header, space: list[Parameter], trial: Trial) -> dict[str, Any]:
    run = RunDirectory(trial_folder(folder, trial.number))
    status = run.status() if trial.state == OPEN else {}
    state = str(status.get("state") or "not started") if trial.state == OPEN else trial.state
    return {
        "trial": trial.number,
        "parameters": parameters_of(space, trial),
        "state": state,
        "value": trial.value,
        "epoch": trial.epoch if trial.state != OPEN else status.get("epoch"),
        "steps": trial.steps if trial.state != OPEN else status.get("step"),
        "total_steps": trial.total_steps if trial.state != OPEN else status.get("total_steps"),
        "error": trial.error,
        "run_dir": str(run.root),
        "command": command_of(header, space, trial),
    }


def parameters_of(space: list[Parameter], trial: Trial) -> Mapping[str, Any]:
    """Return the parameters of a trial, by key."""
    return {p.key: trial.params[p.key] for p in space if p.key in trial.params}


def overrides_of(space: list[Parameter], trial: Trial) -> list[str]:
    """Return the parameters of a trial as overrides."""
    return [p.override(trial.params[p.key]) for p in space if p.key in trial.params]


def command_of(header: Header, space: list[Parameter], trial: Trial) -> str:
    """Return the command that trains the parameters of a trial from the beginning to the end."""
    config = (
        os.path.relpath(header.config) if Path(header.config).is_relative_to(Path.cwd()) else header.config
    )
    return shlex.join(["dl2pa", "train", config, *header.overrides, *overrides_of(space, trial)])
