"""The spool: every tracking event of a run, one JSON line each, on disk before anything else sees it.

``RUN/events/events.jsonl`` holds all attempts of a run. An event has a kind ``e`` (start, metrics, tags,
artifact, end), a time ``t`` (ms) and an attempt ``a``. A point is keyed by (name, step) and its first value
wins, so that a killed and resumed run, which repeats steps, records each once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
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

from dl2pa.tracking.cleaning import clean_name, clean_params, clean_tags, encode_number
from dl2pa.tracking.files import read_json, write_json

Event = dict[str, Any]

_log = logging.getLogger(__name__)
_MAX_OWED = 256
_FIELDS: dict[Any, tuple[str, ...]] = {
    "start": ("run", "params", "tags"),
    "metrics": ("step", "v"),
    "tags": ("tags",),
    "artifact": ("path", "folder"),
    "end": ("status",),
}


def events_folder(run_dir: Path) -> Path:
    """The folder of a run's spool and of what its sender noted."""
    return run_dir / "events"


def events_file(run_dir: Path) -> Path:
    """The spool itself."""
    return events_folder(run_dir) / "events.jsonl"


def now_ms() -> int:
    """Milliseconds since 1970, the unit of MLflow's timestamps."""
    return time.time_ns() // 1_000_000


class Entry(NamedTuple):
    """One line of the spool: its event, None where the line is damaged, and the byte offset after it."""

    event: Event | None
    end: int


def read_events(path: Path, offset: int = 0) -> Iterator[Entry]:
    """The complete lines of a spool from ``offset`` on, read one at a time; a torn last line is left out."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        file.seek(offset)
        while (line := file.readline()).endswith(b"\n"):
            offset += len(line)
            yield Entry(_parse(line), offset)


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict):
        return None
    return event if all(name in event for name in ("e", "t", "a", *_FIELDS.get(event.get("e"), ()))) else None


@dataclass(frozen=True)
class Identity:
    """What makes a run one run over all its attempts; written once."""

    run_uuid: str
    experiment: str
    run_name: str
    created: int
    """Milliseconds since 1970."""


def load_identity(run_dir: Path) -> Identity | None:
    """The identity of the run in ``run_dir``: from ``run.json``, or from the spool should that be damaged."""
    content = read_json(events_folder(run_dir) / "run.json")
    if content is None:
        starts = (e.event for e in read_events(events_file(run_dir)) if e.event and e.event["e"] == "start")
        content = next((start.get("run") for start in starts), None)
    try:
        return Identity(**content) if content else None
    except TypeError:
        return None


def ensure_identity(run_dir: Path, experiment: str, run_name: str) -> Identity:
    """The run's identity, made at its first attempt.

    A disk that refuses it is no obstacle: each attempt's start event carries it too.
    """
    identity = load_identity(run_dir) or Identity(uuid.uuid4().hex, experiment, run_name, now_ms())
    file = events_folder(run_dir) / "run.json"
    if read_json(file) is None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, asdict(identity), durable=True)
        except OSError as error:
            _log.warning("could not write %s: %s", file, error)
    return identity


class SeenPoints:
    """The keys (name, step) of the points in a spool, eight bytes each."""

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
        """Note a point; steps mostly come in order, so this appends."""
        steps = self._steps.setdefault(name, array("q"))
        if not steps or step > steps[-1]:
            steps.append(step)
        elif (name, step) not in self:
            steps.insert(bisect_left(steps, step), step)


class Spool:
    """The writing side: appends events of one attempt; never raises for the disk's sake.

    Each event is handed to the operating system as it comes: a killed process loses none. What the disk
    refuses is dropped and counted, except for the few events that are not points: those are kept, up to 256,
    and written when the disk takes them.
    """

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self.path = events_file(run_dir)
        self.attempt = attempt
        self.dropped = 0
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._torn = False
        self._refusing = False
        self._owed: deque[Event] = deque(maxlen=_MAX_OWED)
        self._seen = SeenPoints()
        self._params: dict[str, str] = {}
        self._changed: set[str] = set()

    def start(self, identity: Identity, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Begin the attempt. A param never changes: another value than an earlier attempt's becomes a tag."""
        with self._lock:
            self._open()
            all_tags = clean_tags(tags)
            new: dict[str, str] = {}
            for name, value in clean_params(params).items():
                first = self._params.get(name)
                if first is None:
                    new[name] = value
                elif value != first or name in self._changed:
                    all_tags |= clean_tags({f"dl2pa.changed.{name}": value})
            self._append({"e": "start", "run": asdict(identity), "params": new, "tags": all_tags}, owed=True)
            self._note_start(new, all_tags)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add the points of ``step`` that the spool does not hold yet."""
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
                    _log.warning("metric %s at step %d is no number: %.80r", name, step, value)
            if new and self._append({"e": "metrics", "step": step, "v": new}):
                for name in new:
                    self._seen.add(name, step)

    def event(self, kind: str, **fields: Any) -> None:
        """Add an event that is neither a start nor points."""
        with self._lock:
            self._open()
            self._append({"e": kind, **fields}, owed=True)

    def flush(self) -> None:
        """Wait until the disk holds all events."""
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is not None:
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _append(self, event: Event, *, owed: bool = False) -> bool:
        event = {"e": event["e"], "t": now_ms(), "a": self.attempt, **event}
        while self._owed:
            if not self._write(self._owed[0]):
                break
            self._owed.popleft()
        written = not self._owed and self._write(event)
        if not written and owed and len(self._owed) < _MAX_OWED:
            self._owed.append(event)
        elif not written:
            self.dropped += 1
        return written

    def _write(self, event: Event) -> bool:
        line = json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            self._write_whole(b"\n" + line if self._torn else line)
        except OSError as error:
            if not self._refusing:
                _log.warning(
                    "%s takes no tracking events (%s); training goes on, points are dropped until it does",
                    self.path,
                    error,
                )
            self._refusing = True
            return False
        self._torn = False
        if self._refusing:
            self._refusing = False
            _log.warning("%s takes tracking events again; %d were dropped", self.path, self.dropped)
        return True

    def _write_whole(self, line: bytes) -> None:
        if self._descriptor is None:
            raise OSError("the file could not be opened")
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
        """Open the spool, cut off a line torn by a kill, and learn what earlier attempts recorded."""
        if self._descriptor is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o644)
        except OSError as error:
            _log.debug("cannot open %s: %s", self.path, error)
            return
        self._descriptor = descriptor
        end = 0
        try:
            for entry in read_events(self.path):
                end = entry.end
                self._learn(entry.event or {})
            if os.fstat(descriptor).st_size > end:
                self._torn = True
                os.ftruncate(descriptor, end)
                self._torn = False
        except OSError as error:
            _log.warning("could not read %s to its end: %s", self.path, error)

    def _learn(self, event: Event) -> None:
        if event.get("e") == "metrics":
            for name in event["v"]:
                self._seen.add(name, event["step"])
        elif event.get("e") == "start":
            self._note_start(event["params"], event["tags"])

    def _note_start(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        for name, value in params.items():
            self._params.setdefault(name, value)
        self._changed |= {
            tag.removeprefix("dl2pa.changed.") for tag in tags if tag.startswith("dl2pa.changed.")
        }
