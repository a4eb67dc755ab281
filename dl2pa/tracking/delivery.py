"""Send the spool to a server in order and in batches; the cursor advances when a batch is accepted."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dl2pa.redaction import redact
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.filelock import exclusive_lock
from dl2pa.tracking.server import MAX_METRICS, Point, Server
from dl2pa.tracking.spool import Entry, Event, Identity, load_identity, parse_line, read_events
from dl2pa.tracking.sync_state import SyncState, load_sync_state, save_sync_state

_log = logging.getLogger(__name__)
_MIN_METRICS = 50


@dataclass
class Batch:
    """A unit of sending: points of several metrics events, or one other event."""

    end: int
    """Byte offset of its end in the spool."""
    start: int
    events: int = 0
    points: list[Point] = field(default_factory=lambda: [])
    event: Event | None = None


class NotStarted(RuntimeError):
    """The run has recorded no events yet."""


class Delivery:
    """Send the spool of one run to one server; ``send`` may be called again after any failure.

    Args:
        trusted: whether the user named the server; False if only a file in the run directory names it.
    """

    def __init__(self, run_dir: Path, uri: str, *, trusted: bool = True) -> None:
        self.run_dir = run_dir
        self._spool = RunDirectory(run_dir).spool
        self.uri = uri
        self.identity: Identity | None = None
        """Identity of the run, in case it could not be written to disk."""
        self.unspooled: list[bytes] = []
        """Lines that could not be written to disk; sent from memory after the spool."""
        self.events_sent = 0
        self.points_sent = 0
        self._trusted = trusted
        self._state = load_sync_state(run_dir, uri)
        self._server: Server | None = None
        self._limit = MAX_METRICS
        self._durable = 0

    @property
    def run_id(self) -> str | None:
        """Id of the run on the server; None until the server has answered."""
        return self._state.run_id

    @property
    def cursor(self) -> int:
        """Bytes of the spool that the server has accepted."""
        return self._state.cursor

    @property
    def refused(self) -> int:
        """Number of entries that the server rejected permanently."""
        return self._state.refused

    def is_done(self, *, with_pending: bool) -> bool:
        """Return whether the server has accepted the whole spool; a cheap check."""
        pending_artifacts = with_pending and (self._state.pending_artifacts or self.unspooled)
        return self._spool_size() == self._state.cursor and not pending_artifacts

    def left(self) -> int:
        """Number of events that the server has not accepted."""
        spooled = count_events(self._spool, self._state.cursor)
        return spooled + len(self._state.pending_artifacts) + len(self.unspooled)

    def send(self, *, with_pending: bool, halt: Callable[[], bool] = lambda: False) -> None:
        """Send the remaining events until none is left or ``halt()`` returns True.

        Args:
            with_pending: retry artifacts that could not be sent before.
            halt: called before each batch.

        Raises:
            Busy: another process is sending this spool.
            RunDeleted: the run was deleted on the server.
            Exception: any error of MLflow; the sync state records what was accepted before.
        """
        if self.is_done(with_pending=with_pending):
            return
        with exclusive_lock(RunDirectory(self.run_dir).sync_lock):
            try:
                self._send(self._connect(), with_pending, halt)
            except Exception as error:
                # Smaller batches, in case the server is too slow for large ones.
                self._limit = max(_MIN_METRICS, self._limit // 2)
                if self._server is not None and self._server.is_gone(error):
                    self._server = None
                raise

    def _connect(self) -> Server:
        """Connect to the server and reload the sync state, which another process may have changed."""
        state = load_sync_state(self.run_dir, self.uri)
        if state.run_id == self._state.run_id and state.cursor < self._state.cursor:
            state = self._state
        if self._server is None:
            self._server = Server(self.uri, self._identity(), state.run_id, trusted=self._trusted)
        if state.run_id != self._server.run_id:
            state = SyncState(run_id=self._server.run_id)
            save_sync_state(self.run_dir, self.uri, state)
        if state.cursor > self._spool_size():
            # The state is of another spool. Send everything; the server keeps duplicates once.
            state.cursor, state.pending_artifacts = 0, []
        self._state = state
        return self._server

    def _spool_size(self) -> int:
        try:
            return self._spool.stat().st_size
        except OSError:
            return 0

    def _identity(self) -> Identity:
        identity = load_identity(self.run_dir) or self.identity
        if identity is None:
            raise NotStarted(f"{self.run_dir} contains no tracked run")
        return identity

    def _send(self, server: Server, with_pending: bool, halt: Callable[[], bool]) -> None:
        state = self._state
        if with_pending:
            self._retry_pending(server)
        while not halt() and (batch := next(read_batches(self._spool, state.cursor, self._limit), None)):
            self._make_durable(batch.end)
            if not self._send_batch(server, batch):
                state.pending_artifacts.append(batch.start)
            state.cursor = batch.end
            save_sync_state(self.run_dir, self.uri, state)
        while with_pending and self.unspooled and not halt():
            entries = (Entry(parse_line(line), place) for place, line in enumerate(self.unspooled, 1))
            batch = next(group_events(entries, 0, self._limit))
            self._send_batch(server, batch)
            del self.unspooled[: batch.end]

    def _send_batch(self, server: Server, batch: Batch) -> bool:
        """Send a batch; return False for an artifact to retry later."""
        sent = True
        if batch.points:
            server.send_points(batch.points)
        elif batch.event is not None:
            sent = self._send_event(server, batch.event)
        self._state.refused += server.pop_refused()
        self.events_sent += batch.events
        self.points_sent += len(batch.points)
        self._limit = min(MAX_METRICS, self._limit * 2)
        return sent

    def _make_durable(self, end: int) -> None:
        """Sync the spool to disk up to ``end``, in the sending thread.

        If a machine failure removed points that the server has, the next attempt would record them again with other
        times.
        """
        if end <= self._durable:
            return
        size = self._spool_size()
        with contextlib.suppress(OSError), self._spool.open("rb") as file:
            os.fdatasync(file.fileno())
        self._durable = size

    def _send_event(self, server: Server, event: Event) -> bool:
        """Send an event other than metrics; return False for an artifact to retry later."""
        kind = event["e"]
        if kind == "start":
            server.send_start(event)
        elif kind == "tags":
            server.send_tags(event["tags"])
        elif kind == "inputs":
            server.send_inputs(event["datasets"])
        elif kind == "end":
            server.send_end(event)
        elif kind in ("artifact", "model"):
            outside = next(
                (
                    name
                    for key in ("path", "example")
                    if (name := event.get(key)) and not self._contains(name)
                ),
                None,
            )
            if outside is not None:
                self._state.refused += 1
                _log.warning("%s is outside the run directory and is not sent", outside)
                return True
            try:
                if kind == "model":
                    server.send_model(self.run_dir, event)
                else:
                    server.send_artifact(self.run_dir / event["path"], event["folder"])
            except Exception as error:
                # This raises if the server is down. Otherwise only this artifact fails and must not block later points.
                server.status()
                _log.warning(
                    "%s %s could not be sent to MLflow (%s); it is retried at the end of the run and by sync",
                    kind,
                    event["path"],
                    redact(str(error)),
                )
                return False
        return True

    def _contains(self, name: str) -> bool:
        """Return whether a file, or every file of a folder, is in the run directory after resolving links."""
        root, path = self.run_dir.resolve(), self.run_dir / name
        paths = [path, *(path.rglob("*") if path.is_dir() else ())]
        return all(p.resolve().is_relative_to(root) for p in paths)

    def _retry_pending(self, server: Server) -> None:
        state = self._state
        for offset in list(state.pending_artifacts):
            entry = next(read_events(self._spool, offset), None)
            if entry is None or entry.event is None or self._send_event(server, entry.event):
                state.pending_artifacts.remove(offset)
                state.refused += server.pop_refused()
                save_sync_state(self.run_dir, self.uri, state)
                self.events_sent += 1


def read_batches(path: Path, offset: int, limit: int) -> Iterator[Batch]:
    """Read a spool from ``offset`` in batches of at most ``limit`` points; a single event may exceed it."""
    return group_events(read_events(path, offset), offset, limit)


def group_events(entries: Iterable[Entry], offset: int, limit: int) -> Iterator[Batch]:
    """Group events into batches; ``offset`` is the start of the first event."""
    batch = Batch(start=offset, end=offset)
    for event, end in entries:
        points = _points(event) if event is not None and event["e"] == "metrics" else []
        alone = event is not None and not points
        if batch.end > batch.start and (alone or len(batch.points) + len(points) > limit):
            yield batch
            batch = Batch(start=batch.end, end=batch.end)
        batch.end = end
        batch.events += event is not None
        batch.points += points
        if alone:
            batch.event = event
            yield batch
            batch = Batch(start=end, end=end)
    if batch.end > batch.start:
        yield batch


def count_events(path: Path, start: int = 0, end: int | None = None) -> int:
    """Count the events of a spool between two offsets."""
    count = 0
    for entry in read_events(path, start):
        if end is not None and entry.end > end:
            break
        count += entry.event is not None
    return count


def _points(event: Event) -> list[Point]:
    return [Point(name, float(value), event["t"], event["step"]) for name, value in event["v"].items()]
