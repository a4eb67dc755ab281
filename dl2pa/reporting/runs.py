"""Run directories as they lie on disk: those that are finished, with what they measured, and the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dl2pa.config import Config, load_config
from dl2pa.config.identity import NEUTRAL
from dl2pa.config.load import PLACES
from dl2pa.errors import UserError

GROUPS = ("head", "medium", "tail")
"""Classes of long-tailed data by their number of training images."""
_CHANGED = "dl2pa.changed."
"""Beginning of the tags by which an attempt says what it changed; ``dl2pa.tracking`` writes them."""
_NO_RUNS_BELOW = {"mlartifacts", "mlruns"}

Percent = Annotated[float, Field(ge=0, le=100)]


class Result(BaseModel):
    """What of `result.json` is compared."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    top1_last: Percent
    top1_best: Percent
    ece_last: Percent | None = None
    top1_head: Percent | None = None
    top1_medium: Percent | None = None
    top1_tail: Percent | None = None
    num_validated: int
    num_classes: int
    epochs: int
    steps: int
    world_size: int = 1

    def of_group(self, group: str) -> float | None:
        """Accuracy over the head, medium or tail classes, at the end."""
        return getattr(self, f"top1_{group}")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        finished: when, in seconds since 1970.
        environment: of its last attempt.
        changed: keys of the configuration that an attempt changed midway, so that no one recipe made the result.
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
    def is_cut(self) -> bool:
        """Whether `train.max_steps` ended it before its last epoch."""
        return self.result.epochs < self.config.train.epochs


@dataclass(frozen=True)
class Unfinished:
    """A run directory that does not count, and why."""

    path: Path
    state: str
    reason: str


def find_runs(named: Iterable[Path], below: Path | None) -> list[Path]:
    """The run directories named and those in a folder at any depth, each once.

    Raises:
        UserError: a name that is no run directory, or a folder without any.
    """
    found: dict[Path, Path] = {}
    for path in named:
        if not _is_run(path):
            remedy = "Give the folder `dl2pa train` wrote, or --all DIR for those in a folder."
            raise UserError("run", str(path), "is not a run directory", remedy)
        found.setdefault(path.resolve(), path)
    if below is not None:
        inside = list(_walk(below))
        if not inside:
            message = "holds no run directory" if below.is_dir() else "is no folder"
            raise UserError(
                "--all", str(below), message, "Give the folder that holds the runs, often `runs`."
            )
        for path in inside:
            found.setdefault(path.resolve(), path)
    if not found:
        raise UserError("run", None, "nothing to report on", "Name run directories, or give --all DIR.")
    return list(found.values())


def read_run(path: Path) -> Run | Unfinished:
    """A run as it stands."""
    status = _read_json(path / "status.json")
    state = str(status.get("state") or "not started")
    if state != "finished":
        total = f" of {status['total_steps']:,}" if status.get("total_steps") else ""
        at = f"at step {status['step']:,}{total}" if "step" in status else "has done no step"
        said = f"; {status['error']}" if status.get("error") else ""
        return Unfinished(path, state, at + said)
    try:
        config = load_config(path / "config.yaml")
        result = Result.model_validate(_with_groups(path))
    except UserError as error:
        return Unfinished(path, "unreadable", f"config.yaml: {error}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Unfinished(path, "unreadable", f"result.json is missing or damaged ({where}: {first['msg']})")
    attempts = _read_json(path / "environment.json").get("attempts") or [{}]
    changed = _changed_between_attempts(path / "events/events.jsonl", config)
    return Run(path, config, result, float(status.get("updated", 0.0)), attempts[-1], changed)


def _with_groups(path: Path) -> dict[str, Any]:
    """`result.json`, with the groups' accuracies from `validation.json` where it has none."""
    result, validation = _read_json(path / "result.json"), _read_json(path / "validation.json")
    if validation.get("num_validated") == result.get("num_validated"):
        result = {**{f"top1_{k}": validation.get(f"top1_{k}") for k in GROUPS}, **result}
    return result


def _changed_between_attempts(spool: Path, config: Config) -> tuple[str, ...]:
    """Keys that a later attempt began with another value of, those left out that change no result.

    The spool marks them with tags. `train.max_steps` only ends a run; `train.epochs` does no more where the
    schedule does not depend on it.
    """
    harmless = [*PLACES, *NEUTRAL, "train.max_steps"]
    if config.optim.schedule != "cosine":
        harmless.append("train.epochs")
    names = {name for tags in _tags_of_attempts(spool) for name in tags}
    changed = {name.removeprefix(_CHANGED) for name in names if name.startswith(_CHANGED)}
    return tuple(sorted(key for key in changed if not key.startswith(tuple(harmless))))


def tags_of(run: Path) -> dict[str, str]:
    """The tags that a run's attempts recorded when they began, the last attempt's where they differ."""
    found: dict[str, str] = {}
    for tags in _tags_of_attempts(run / "events/events.jsonl"):
        found.update(tags)
    return found


def _tags_of_attempts(spool: Path) -> Iterator[dict[str, str]]:
    try:
        lines = spool.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        if b'"start"' not in line:
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and event.get("e") == "start" and isinstance(event.get("tags"), dict):
            yield event["tags"]


def _walk(folder: Path) -> Iterator[Path]:
    """Run directories in a folder, in the order of their names; nothing is looked for inside a run."""
    if _is_run(folder):
        yield folder
        return
    try:
        inside = [entry for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return
    for entry in sorted(inside, key=lambda e: e.name):
        if not entry.name.startswith(".") and entry.name not in _NO_RUNS_BELOW:
            yield from _walk(Path(entry.path))


def _is_run(path: Path) -> bool:
    """Whether a training wrote here, or was submitted to."""
    return (path / "status.json").is_file() or (path / "slurm/job.json").is_file()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
