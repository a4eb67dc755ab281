"""The spool: all tracking events of a run on disk, one JSON object per line.

``RUN/events/events.jsonl`` contains all attempts of a run. An event has a kind ``e`` (start, metrics, tags, artifact,
inputs, model, end), a time ``t`` (ms) and an attempt ``a``. Of several points with the same (name, step), the first is
kept, so a resumed run that repeats steps records each step once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
import uuid
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dl2pa import fence
from dl2pa.osutil import describing_full_disk, reason_of, write_atomically
from dl2pa.records import DamagedFile, check_record, read_record
from dl2pa.rundir import RunDirectory, warn_damaged
from dl2pa.tracking.sanitize import clean_name, clean_params, clean_tags, encode_number

Event = dict[str, Any]

_log = logging.getLogger(__name__)
CHANGED_TAG = "dl2pa.changed."
"""Prefix of the tags that name a configuration key changed by an attempt."""
MAX_WAITING_BYTES = 32 << 20
"""Maximum size of events in memory while the disk fails; about 200,000 log points."""
MAX_SPOOL_BYTES = 1 << 30
"""Maximum size of a spool, so that excessive logging does not fill the disk; about 20 million points."""
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "start": {"run": dict, "params": dict, "tags": dict},
    "metrics": {"step": int, "v": dict},
    "tags": {"tags": dict},
    "artifact": {"path": str, "folder": str},
    "inputs": {"datasets": list},
    "model": {
        "path": str,
        "example": (str, type(None)),
        "sha256": str,
        "step": int,
        "requirements": list,
        "params": dict,
        "tags": dict,
    },
    "end": {"status": str},
}
"""Required fields and types of each kind of event; other lines are treated as damaged."""


def now_ms() -> int:
    """Milliseconds since 1970, the unit of MLflow's timestamps."""
    return time.time_ns() // 1_000_000


class Entry(NamedTuple):
    """One line of the spool: its event (None if damaged) and the byte offset of its end."""

    event: Event | None
    end: int


def read_events(path: Path, offset: int = 0) -> Iterator[Entry]:
    """Read the complete lines of a spool from ``offset``; a truncated last line is skipped."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        file.seek(offset)
        while (line := file.readline()).endswith(b"\n"):
            offset += len(line)
            yield Entry(parse_line(line), offset)


def parse_line(line: bytes) -> Event | None:
    """Parse a line; return None if it is damaged."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if _is_valid(event) else None


def _is_valid(event: Any) -> bool:
    """Return whether all required fields exist and have the right type."""
    if not isinstance(event, dict) or not isinstance(event.get("e"), str):
        return False
    fields = {"t": int, "a": int, **_FIELDS.get(event["e"], {})}
    if not all(name in event and isinstance(event[name], kind) for name, kind in fields.items()):
        return False
    return event["e"] != "metrics" or all(_is_number(value) for value in event["v"].values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value in ("nan", "inf", "-inf")


@dataclass(frozen=True)
class Identity:
    """Identity of a run, shared by all its attempts; written once."""

    run_uuid: str
    experiment: str
    run_name: str
    created: int
    """Milliseconds since 1970."""
    copied_from: str | None = None
    """run_uuid of the run whose directory was copied; None if there is none."""


_IDENTITY = {"run_uuid": str, "experiment": str, "run_name": str, "created": int, "copied_from": str}
_REQUIRED = ("run_uuid", "experiment", "run_name", "created")


def load_identity(run_dir: Path) -> Identity | None:
    """Load the identity of a run from ``run.json``, or from the spool if that file is missing or damaged."""
    run = RunDirectory(run_dir)
    identity = _stored_identity(run.identity)
    if identity is None:
        starts = (e.event for e in read_events(run.spool) if e.event and e.event["e"] == "start")
        identities = filter(None, (_parse_identity(start["run"]) for start in starts))
        identity = next(reversed(list(identities)), None)  # a copy has a later identity
    return identity


def _stored_identity(file: Path) -> Identity | None:
    """Read ``run.json``; None if it is missing, or damaged, which is logged."""
    try:
        content = read_record(file, {})
        if content is None:
            return None
        identity = _parse_identity(content)
        if identity is None:
            raise DamagedFile(file, "it does not contain the identity of a run")
        return identity
    except DamagedFile as damaged:
        warn_damaged(file, damaged.reason)
        return None


def _parse_identity(content: Any) -> Identity | None:
    try:
        identity = Identity(**check_record(content, _IDENTITY, _REQUIRED))
    except (ValueError, TypeError):
        return None
    # The uuid is inserted into a query to the server.
    is_valid = re.fullmatch(r"[0-9a-f]{32}", str(identity.run_uuid))
    return identity if is_valid else None


def ensure_identity(run_dir: Path, experiment: str, run_name: str) -> Identity:
    """Load the identity of a run, or create it in the first attempt.

    A failure to write it is only logged, because the start event of each attempt contains it too.
    """
    identity = load_identity(run_dir) or Identity(uuid.uuid4().hex, experiment, run_name, now_ms())
    file = RunDirectory(run_dir).identity
    if _stored_identity(file) != identity:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(asdict(identity)))
        except OSError as error:
            _log.warning("could not write %s: %s", file, error)
    return identity


class SeenPoints:
    """The (name, step) keys of the points in a spool, 8 bytes per key."""

    def __init__(self) -> None:
        self._steps: dict[str, array[int]] = {}

    def __contains__(self, key: tuple[str, int]) -> bool:
        name, step = key
        steps = self._steps.get(name)
        if not steps or step > steps[-1]:
            return False
        place = bisect_left(steps, step)
        return steps[place] == step

    def add(self, name: str, step: int) -> None:
        """Add a key; appends in the usual case of increasing steps."""
        steps = self._steps.setdefault(name, array("q"))
        if not steps or step > steps[-1]:
            steps.append(step)
        elif (name, step) not in self:
            steps.insert(bisect_left(steps, step), step)


class Spool:
    """Writer of the spool: append events of one attempt without raising disk errors.

    Each event is written to the operating system at once, so a killed process loses none. If a write fails, the event
    waits in memory with its time until a write succeeds. Beyond ``MAX_WAITING_BYTES`` in memory or
    ``MAX_SPOOL_BYTES`` on disk, points are dropped and counted.
    """

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self.path = RunDirectory(run_dir).spool
        self.attempt = attempt
        self.dropped = 0
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._open_error: OSError | None = None
        self._torn = False
        self._failing = False
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._size = 0
        self._running: tuple[int, int] | None = None
        self._seen = SeenPoints()
        self._params: dict[str, str] = {}
        self._changed: set[str] = set()

    def start(self, identity: Identity, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record the start of the attempt. A param never changes; a value that differs from it becomes a tag."""
        with self._lock:
            self._open()
            self._end_killed()
            all_tags = clean_tags(tags)
            new: dict[str, str] = {}
            for name, value in clean_params(params).items():
                first = self._params.get(name)
                if first is None:
                    new[name] = value
                elif value != first or name in self._changed:
                    all_tags |= clean_tags({f"{CHANGED_TAG}{name}": value})
            self._append({"e": "start", "run": asdict(identity), "params": new, "tags": all_tags})
            self._add_start(new, all_tags)

    def metrics(self, step: int, values: Mapping[str, Any], time_ms: int | None = None) -> None:
        """Add the points of ``step`` that are not in the spool, measured now or at ``time_ms``."""
        with self._lock:
            self._open()
            new: dict[str, float | str] = {}
            for raw_name, value in values.items():
                name = clean_name(raw_name)
                if name in new or (name, step) in self._seen:
                    continue
                try:
                    new[name] = encode_number(value)
                except (TypeError, ValueError):
                    self.dropped += 1
                    _log.warning("metric %s at step %d is not a number: %.80r", name, step, value)
            when = {} if time_ms is None else {"t": time_ms}
            if new and self._append({"e": "metrics", **when, "step": step, "v": new}):
                for name in new:
                    self._seen.add(name, step)

    def event(self, kind: str, **fields: Any) -> None:
        """Add an event other than start and metrics."""
        with self._lock:
            self._open()
            self._append({"e": kind, **fields})

    def unended(self) -> int | None:
        """Return the number of an earlier attempt without an end event; None if there is none."""
        with self._lock:
            self._open()
            return None if self._running is None else self._running[0]

    def end_killed(self) -> bool:
        """Add the missing end event of a killed attempt; return whether one was missing."""
        with self._lock:
            self._open()
            return self._end_killed()

    def take_waiting(self) -> list[bytes]:
        """Remove and return the lines that could not be written to disk, oldest first."""
        with self._lock:
            self._write_waiting()
            lines = list(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            return lines

    def flush(self) -> None:
        """Sync the spool to disk."""
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is not None:
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _end_killed(self) -> bool:
        if self._running is None:
            return False
        attempt, last_time = self._running
        self._running = None
        return self._append({"e": "end", "t": last_time, "a": attempt, "status": "killed", "dropped": 0})

    def _append(self, event: Event) -> bool:
        """Write an event or keep it in memory; return False if it was dropped."""
        event = {"e": event["e"], "t": now_ms(), "a": self.attempt, **event}
        line = json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        bounded = event["e"] == "metrics"
        if bounded and self._size + self._waiting_bytes + len(line) > MAX_SPOOL_BYTES:
            self._warn_once(f"its size is {MAX_SPOOL_BYTES >> 20:,} MiB")
        elif self._write_waiting() and self._write(line):
            return True
        elif self._waiting_bytes + len(line) <= MAX_WAITING_BYTES or not bounded:
            self._waiting.append(line)
            self._waiting_bytes += len(line)
            return True
        self.dropped += 1
        return False

    def _write_waiting(self) -> bool:
        """Write the lines in memory, oldest first; return whether none is left."""
        while self._waiting:
            if not self._write(self._waiting[0]):
                return False
            self._waiting_bytes -= len(self._waiting.popleft())
        return True

    def _write(self, line: bytes) -> bool:
        try:
            with describing_full_disk(self.path.parent, len(line)):
                self._write_line(b"\n" + line if self._torn else line)
        except OSError as error:
            self._warn_once(reason_of(error))
            return False
        self._torn = False
        self._size += len(line)
        if self._failing:
            self._failing = False
            _log.warning("tracking events are written to %s again; %d were dropped", self.path, self.dropped)
        return True

    def _warn_once(self, reason: str) -> None:
        if not self._failing:
            _log.warning(
                "cannot write tracking events to %s (%s); they wait in memory, training continues",
                self.path,
                reason,
            )
        self._failing = True

    def _write_line(self, line: bytes) -> None:
        fence.check(self.path, fresh=False)
        if self._descriptor is None:
            raise self._open_error or OSError("the file could not be opened")
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            if written:
                self._torn = True
                size = os.fstat(self._descriptor).st_size
                os.ftruncate(self._descriptor, size - written)
                self._torn = False
            raise

    def _open(self) -> None:
        """Open the spool, remove a line truncated by a kill, and read what earlier attempts recorded."""
        if self._descriptor is not None:
            return
        fence.check(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o644)
        except OSError as error:
            self._open_error = error
            return
        self._descriptor = descriptor
        end = 0
        try:
            for entry in read_events(self.path):
                end = entry.end
                self._read_event(entry.event or {})
            self._size = end
            if os.fstat(descriptor).st_size > end:
                self._torn = True
                os.ftruncate(descriptor, end)
                self._torn = False
        except OSError as error:
            _log.warning("could not read %s to its end: %s", self.path, error)

    def _read_event(self, event: Event) -> None:
        if event.get("e") == "end":
            self._running = None
        elif event.get("e") == "start" or self._running is not None:
            self._running = (event.get("a", 0), event.get("t", 0))
        if event.get("e") == "metrics":
            for name in event["v"]:
                self._seen.add(name, event["step"])
        elif event.get("e") == "start":
            self._add_start(event["params"], event["tags"])

    def _add_start(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        for name, value in params.items():
            self._params.setdefault(name, value)
        self._changed |= {tag.removeprefix(CHANGED_TAG) for tag in tags if tag.startswith(CHANGED_TAG)}
