"""Find and read run directories: finished runs with their results, and unfinished ones with their state."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dl2pa.config import Config, load_recorded_config
from dl2pa.config.identity import NEUTRAL
from dl2pa.config.load import LOCAL_KEYS, RENAMED_KEYS
from dl2pa.errors import UserError
from dl2pa.records import DamagedFile
from dl2pa.rundir import DAMAGED, RunDirectory
from dl2pa.tracking.spool import CHANGED_TAG, parse_line

_SKIPPED_FOLDERS = {"mlartifacts", "mlruns"}

Percent = Annotated[float, Field(ge=0, le=100)]


class Result(BaseModel):
    """The fields of `result.json` that are compared."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    top1_last: Percent
    top1_best: Percent
    ece_last: Percent | None = None
    ece_calibrated: Percent | None = None
    nll: float | None = None
    nll_calibrated: float | None = None
    top1_head: Percent | None = None
    top1_medium: Percent | None = None
    top1_tail: Percent | None = None
    num_validated: int
    num_classes: int
    epochs: int
    steps: int
    stopped_early: bool = False
    world_size: int = 1


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        finished: seconds since 1970.
        environment: environment of the last attempt.
        changed: configuration keys that changed between attempts, so that the result has no single recipe.
    """

    path: Path
    config: Config
    result: Result
    finished: float
    environment: dict[str, Any]
    changed: tuple[str, ...]

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def data_fingerprint(self) -> str | None:
        """Fingerprint of the training and validation images; None if the run did not record it."""
        return self.environment.get("data_fingerprint")

    @property
    def is_cut(self) -> bool:
        """Whether `train.max_steps` ended the run before its last epoch."""
        return self.result.epochs < self.config.train.epochs and not self.result.stopped_early


@dataclass(frozen=True)
class Unfinished:
    """A run that is not compared, with its state and the reason."""

    path: Path
    state: str
    reason: str


def find_runs(named: Iterable[Path], below: Path | None) -> list[Path]:
    """List the named run directories and those in a folder at any depth, each once.

    Raises:
        UserError: a named path is not a run directory, the folder contains none, or nothing was given.
    """
    runs: dict[Path, Path] = {}
    for path in named:
        if not _is_run(path):
            remedy = "Give a folder written by `dl2pa train`, or --all DIR for all runs in a folder."
            raise UserError("run", str(path), "is not a run directory", remedy)
        runs.setdefault(path.resolve(), path)
    if below is not None:
        inside = list(_walk(below))
        if not inside:
            message = "contains no run directory" if below.is_dir() else "is not a folder"
            raise UserError("--all", str(below), message, "Give the folder of the runs, usually `runs`.")
        for path in inside:
            runs.setdefault(path.resolve(), path)
    if not runs:
        raise UserError("run", None, "no run directory was given", "Name run directories, or give --all DIR.")
    return list(runs.values())


def read_run(path: Path) -> Run | Unfinished:
    """Read a run directory."""
    run_dir = RunDirectory(path)
    status = run_dir.status()
    state = str(status.get("state") or "not started")
    if state != "finished":
        total = f" of {status['total_steps']:,}" if status.get("total_steps") else ""
        at = "no step done" if status.get("step") is None else f"at step {status['step']:,}{total}"
        if state == DAMAGED:
            return Unfinished(path, state, str(status["error"]))
        error = f"; {status['error']}" if status.get("error") else ""
        return Unfinished(path, state, at + error)
    try:
        config = load_recorded_config(run_dir.config)
        result = Result.model_validate(run_dir.read_result())
    except DamagedFile as damaged:
        return Unfinished(path, "unreadable", damaged.problem)
    except UserError as error:
        return Unfinished(path, "unreadable", f"{run_dir.config.name}: {error}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = f"damaged ({where}: {first['msg']})" if run_dir.result.exists() else "missing"
        message = f"{run_dir.result.name} is {problem}"
        return Unfinished(path, "unreadable", message)
    environment = next(reversed(run_dir.attempts()), {})
    changed = changed_between_attempts(run_dir.spool, config)
    return Run(path, config, result, float(status.get("updated") or 0.0), environment, changed)


def changed_between_attempts(spool: Path, config: Config) -> tuple[str, ...]:
    """List the keys that affect the result and that a later attempt changed, according to the tags in the spool.

    `train.max_steps` only ends a run; so does `train.epochs` unless the schedule depends on it.
    """
    neutral = [*LOCAL_KEYS, *NEUTRAL, "train.max_steps"]
    if config.optim.schedule != "cosine":
        neutral.append("train.epochs")
    try:
        lines = spool.read_bytes().splitlines()
    except OSError:
        return ()
    starts = (parse_line(line) for line in lines if b'"start"' in line)
    names: set[str] = {name for start in starts if start and start["e"] == "start" for name in start["tags"]}
    keys = {name.removeprefix(CHANGED_TAG) for name in names if name.startswith(CHANGED_TAG)}
    changed = {RENAMED_KEYS.get(key, key) for key in keys}
    return tuple(sorted(key for key in changed if not key.startswith(tuple(neutral))))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the run directories in a folder, ordered by name; run directories are not searched."""
    if _is_run(folder):
        yield folder
        return
    try:
        inside = [entry for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return
    for entry in sorted(inside, key=lambda e: e.name):
        if not entry.name.startswith(".") and entry.name not in _SKIPPED_FOLDERS:
            yield from _walk(Path(entry.path))


def _is_run(path: Path) -> bool:
    """Whether a run was started in this folder or submitted with it."""
    run = RunDirectory(path)
    return run.status_file.is_file() or run.job.is_file()
