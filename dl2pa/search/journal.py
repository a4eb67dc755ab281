"""Journal of a search: one line per decision, written before the decision takes effect.

All state of a search is in this file or derived from it, so a command that was killed at any moment continues from
the complete lines. Events:

- `search`: the first line: identity of the search, and the keys that must not change.
- `trial`: parameters of a new trial, before it starts.
- `report`: value of a trial at a rung, and whether the trial is stopped there.
- `end`: state and value of a trial that has ended.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dl2pa.errors import TrainingFailure, UserError
from dl2pa.osutil import LockResult, describing_full_disk, try_lock
from dl2pa.records import DamagedFile, check_record, parse_record

JOURNAL = "search.jsonl"
LOCK = "search.lock"
OPEN, FINISHED, PRUNED, FAILED = "open", "finished", "pruned", "failed"
STATES = (FINISHED, PRUNED, FAILED, OPEN)
_WAIT_S, _POLL_S = 0.5, 0.05

_FIELDS: dict[str, tuple[dict[str, type], tuple[str, ...]]] = {
    "search": (
        {"id": str, "name": str, "config": str, "overrides": list, "fingerprint": str, "keys": dict},
        ("id", "name", "config", "overrides", "fingerprint", "keys"),
    ),
    "trial": ({"number": int, "params": dict, "attrs": dict}, ("number", "params", "attrs")),
    "report": (
        {"number": int, "epoch": int, "value": float, "prune": bool, "attrs": dict},
        ("number", "epoch", "value", "prune", "attrs"),
    ),
    "end": (
        {"number": int, "state": str, "value": float, "epoch": int, "steps": int, "error": str},
        ("number", "state"),
    ),
}
"""Types of the fields of each event, and the required fields."""


@dataclass
class Trial:
    """State of one trial.

    Attributes:
        params: value of each parameter; a choice is the text of an override.
        attrs: attributes that Optuna keeps with the trial.
        reports: epoch and value at each rung that the trial has reached.
        prune: whether the trial is to be stopped early.
        state: `open` until it has ended, then `finished`, `pruned` or `failed`.
        value: value of the metric at the end, in percent.
        epoch, steps, total_steps: position at the end, and steps of a complete training.
    """

    number: int
    params: dict[str, Any]
    attrs: dict[str, Any]
    reports: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    prune: bool = False
    state: str = OPEN
    value: float | None = None
    epoch: int | None = None
    steps: int | None = None
    total_steps: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Header:
    """Identity of a search.

    Attributes:
        id: unique, 32 hexadecimal digits.
        config: configuration file, absolute.
        overrides: `key=value` for every trial.
        fingerprint: of the configuration with the lowest values.
        keys: keys of the search file that must not change.
    """

    id: str
    name: str
    config: str
    overrides: tuple[str, ...]
    fingerprint: str
    keys: Mapping[str, Any]


@dataclass
class State:
    """Content of a journal."""

    header: Header | None = None
    trials: list[Trial] = field(default_factory=list[Trial])
    ended: list[Trial] = field(default_factory=list[Trial])
    """Trials in the order in which they ended."""

    def apply(self, event: Mapping[str, Any]) -> None:
        """Apply one event.

        Raises:
            ValueError: the event does not fit the events before it.
        """
        kind = event["e"]
        if (kind == "search") != (self.header is None):
            raise ValueError("the first line, and only the first, must describe the search")
        if kind == "search":
            values: dict[str, Any] = {name: event[name] for name in Header.__dataclass_fields__}
            values["overrides"] = tuple(event["overrides"])
            self.header = Header(**values)
            return
        number = event["number"]
        if kind == "trial":
            if number != len(self.trials):
                raise ValueError(f"trial {number} follows {len(self.trials)} trials")
            self.trials.append(Trial(number, dict(event["params"]), dict(event["attrs"])))
            return
        if not 0 <= number < len(self.trials) or self.trials[number].state != OPEN:
            raise ValueError(f"trial {number} is not open")
        trial = self.trials[number]
        if kind == "report":
            trial.reports.append((event["epoch"], event["value"]))
            trial.attrs |= event["attrs"]
            trial.prune = event["prune"]
            return
        if event["state"] not in (FINISHED, PRUNED, FAILED):
            raise ValueError(f"{event['state']} is not a state")
        for name in ("state", "value", "epoch", "steps", "total_steps", "error"):
            setattr(trial, name, event.get(name))
        self.ended.append(trial)

    def open(self) -> list[Trial]:
        """Return the trials that have not ended, in order."""
        return [trial for trial in self.trials if trial.state == OPEN]

    def counts(self) -> dict[str, int]:
        """Return the number of trials in each state."""
        return {state: sum(trial.state == state for trial in self.trials) for state in STATES}

    def best(self, *, maximize: bool) -> Trial | None:
        """Return the finished trial with the best value, the first of equal ones; None without one."""
        finished = [trial for trial in self.trials if trial.state == FINISHED and trial.value is not None]
        sign = -1.0 if maximize else 1.0
        return min(finished, key=lambda trial: (sign * float(trial.value or 0.0), trial.number), default=None)


def is_search(folder: Path) -> bool:
    """Whether a folder contains a search."""
    return (folder / JOURNAL).is_file()


def is_running(folder: Path) -> bool:
    """Whether a process runs the search in a folder, as far as locks show it."""
    try:
        with (folder / LOCK).open("a+", encoding="utf-8") as file:
            return try_lock(file.fileno()) is LockResult.HELD
    except OSError:
        return False


def read_state(folder: Path) -> State:
    """Read the journal of a search, which another process may be writing; empty if there is none.

    Raises:
        DamagedFile: a complete line is damaged.
    """
    return _parse(folder / JOURNAL, _content(folder / JOURNAL))[0]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise DamagedFile(path, f"it cannot be read: {error.strerror or error}") from None


def _parse(path: Path, content: bytes) -> tuple[State, int]:
    """Apply the complete lines; returns the state and their length in bytes."""
    state, end = State(), content.rfind(b"\n") + 1
    for number, line in enumerate(content[:end].splitlines(), 1):
        try:
            event = parse_record(line)
            kind = check_record(event, {"e": str}, ["e"])["e"]
            if kind not in _FIELDS:
                raise ValueError(f"{kind} is not an event of this version")
            state.apply(check_record(event, *_FIELDS[kind]))
        except ValueError as error:
            raise DamagedFile(path, f"line {number}: {error}") from None
    return state, end


def _lock_soon(file: IO[str]) -> bool:
    """Lock a file; waits for `is_running`, which holds the lock for a moment. False if another process keeps it."""
    deadline = time.monotonic() + _WAIT_S
    while try_lock(file.fileno()) is LockResult.HELD:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


class Journal:
    """The journal of a search, locked for this process.

    Args:
        folder: folder of the search, created if missing.

    Raises:
        UserError: another process runs this search, the folder cannot be written, or the journal is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / JOURNAL
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] | None = (folder / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            message = f"cannot be written ({error.strerror})"
            raise UserError("run-dir", str(folder), message, "Choose another with --run-dir.") from None
        if not _lock_soon(self._lock):
            self._lock.close()
            message = "another process runs this search"
            raise UserError(
                "run-dir", str(folder), message, "Wait for it, stop it, or give another --run-dir."
            )
        try:
            self.state, self._size = _parse(self._path, _content(self._path))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(self, header: Header) -> None:
        """Write the first line of a new search."""
        self._append({"e": "search", "version": 1, **vars(header), "overrides": list(header.overrides)})

    def start(self, params: Mapping[str, Any], attrs: Mapping[str, Any]) -> Trial:
        """Record a new trial; call before it starts."""
        number = len(self.state.trials)
        self._append({"e": "trial", "number": number, "params": dict(params), "attrs": dict(attrs)})
        return self.state.trials[number]

    def report(
        self, trial: Trial, epoch: int, value: float, *, prune: bool, attrs: Mapping[str, Any]
    ) -> None:
        """Record the value of a trial at a rung and the decision there; call before the trial is stopped."""
        event = {"e": "report", "number": trial.number, "epoch": epoch, "value": value, "prune": prune}
        self._append({**event, "attrs": dict(attrs)})

    def end(self, trial: Trial, state: str, **fields: Any) -> None:
        """Record that a trial has ended.

        Args:
            fields: value, epoch, steps, total_steps and error, as far as they are known.
        """
        self._append({"e": "end", "number": trial.number, "state": state, **fields})

    def _append(self, event: dict[str, Any]) -> None:
        """Write an event durably, then apply it. A line that a kill has truncated is removed first."""
        line = json.dumps({**event, "t": time.time()}, allow_nan=False).encode() + b"\n"
        with describing_full_disk(self._path.parent, len(line)), self._path.open("ab") as file:
            content = _content(self._path)
            if content.rfind(b"\n") + 1 != self._size:
                raise TrainingFailure(f"{self._path} was changed by another process, which runs this search")
            file.truncate(self._size)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(line)
        self.state.apply(event)
