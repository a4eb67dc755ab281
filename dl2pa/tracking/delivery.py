"""From the spool to the server: in order, in batches; the cursor moves when a batch was accepted."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
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
    """What is sent before the cursor moves: points of several events, or one event of another kind."""

    end: int
    """Byte offset in the spool after it."""
    start: int
    events: int = 0
    points: list[Point] = field(default_factory=lambda: [])
    event: Event | None = None


class NotStarted(RuntimeError):
    """The run has recorded nothing yet."""


class Delivery:
    """Sends one run's spool to one server. ``send`` may be called again after any failure.

    Args:
        trusted: whether the user named the server; false where only a file in the run directory does.
    """

    def __init__(
        self, run_dir: Path, uri: str, experiment: str | None = None, *, trusted: bool = True
    ) -> None:
        self.run_dir = run_dir
        self._spool = RunDirectory(run_dir).spool
        self.uri = uri
        self.identity: Identity | None = None
        """The run's, where the disk may not have taken it."""
        self.unspooled: list[bytes] = []
        """Lines for the end of the run that no disk took: sent from memory, after the spool."""
        self.events_sent = 0
        self.points_sent = 0
        self._experiment = experiment
        self._trusted = trusted
        self._state = load_sync_state(run_dir, uri)
        self._server: Server | None = None
        self._limit = MAX_METRICS
        self._durable = 0

    @property
    def run_id(self) -> str | None:
        """The run's id on the server, None until it answered."""
        return self._state.run_id

    @property
    def cursor(self) -> int:
        """How much of the spool the server has, in bytes."""
        return self._state.cursor

    @property
    def refused(self) -> int:
        """Entries the server will never take."""
        return self._state.refused

    def is_done(self, *, with_pending: bool) -> bool:
        """Whether the server has all of the spool; cheap."""
        pending_artifacts = with_pending and (self._state.pending_artifacts or self.unspooled)
        return self._spool_size() == self._state.cursor and not pending_artifacts

    def left(self) -> int:
        """Events the server does not have."""
        spooled = count_events(self._spool, self._state.cursor)
        return spooled + len(self._state.pending_artifacts) + len(self.unspooled)

    def send(self, *, with_pending: bool, halt: Callable[[], bool] = lambda: False) -> None:
        """Send what the server misses until nothing is left or ``halt()`` says so.

        Args:
            with_owed: try again the artifacts that did not get through.
            halt: asked before each batch.

        Raises:
            Busy: another process sends this spool.
            RunDeleted: the run was deleted on the server.
            Exception: whatever MLflow raises; what was accepted before is noted.
        """
        if self.is_done(with_pending=with_pending):
            return
        with exclusive_lock(RunDirectory(self.run_dir).sync_lock):
            try:
                self._send(self._connect(), with_pending, halt)
            except Exception as error:
                # A slow server gets smaller batches, so that some arrive in time.
                self._limit = max(_MIN_METRICS, self._limit // 2)
                if self._server is not None and self._server.is_gone(error):
                    self._server = None
                raise

    def _connect(self) -> Server:
        """The server with the run on it, and the latest note: another process may have sent meanwhile."""
        noted = load_sync_state(self.run_dir, self.uri)
        if noted.run_id == self._state.run_id and noted.cursor < self._state.cursor:
            noted = self._state
        if self._server is None:
            identity = self._identity()
            self._server = Server(self.uri, identity, noted.run_id, trusted=self._trusted)
        if noted.run_id != self._server.run_id:
            noted = SyncState(run_id=self._server.run_id)
            save_sync_state(self.run_dir, self.uri, noted)
        if noted.cursor > self._spool_size():
            # Not the spool that the note is about; sending all again changes nothing that is there.
            noted.cursor, noted.pending_artifacts = 0, []
        self._state = noted
        return self._server

    def _spool_size(self) -> int:
        try:
            return self._spool.stat().st_size
        except OSError:
            return 0

    def _identity(self) -> Identity:
        identity = load_identity(self.run_dir) or self.identity
        if identity is None:
            raise NotStarted(f"{self.run_dir} holds no tracked run")
        return replace(identity, experiment=self._experiment) if self._experiment else identity

    def _send(self, server: Server, with_pending: bool, halt: Callable[[], bool]) -> None:
        state = self._state
        if with_pending:
            self._retry_owed(server)
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
        """Send a batch; False for an artifact that has to wait."""
        sent = True
        if batch.points:
            server.send_points(batch.points)
        elif batch.event is not None:
            sent = self._send_event(server, batch.event)
        self._state.refused += server.take_refused()
        self.events_sent += batch.events
        self.points_sent += len(batch.points)
        self._limit = min(MAX_METRICS, self._limit * 2)
        return sent

    def _make_durable(self, end: int) -> None:
        """Wait until the disk holds the spool up to ``end``.

        A machine that fails must not forget points the server has: the next attempt would record them again,
        with other times. Training does not wait for this.
        """
        if end <= self._durable:
            return
        size = self._spool_size()
        with contextlib.suppress(OSError), self._spool.open("rb") as file:
            os.fdatasync(file.fileno())
        self._durable = size

    def _send_event(self, server: Server, event: Event) -> bool:
        """Send an event that is no points; False for an artifact that has to wait."""
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
                (name for key in ("path", "example") if (name := event.get(key)) and not self._holds(name)),
                None,
            )
            if outside is not None:
                self._state.refused += 1
                _log.warning("%s lies outside the run directory and is not sent", outside)
                return True
            try:
                if kind == "model":
                    server.send_model(self.run_dir, event)
                else:
                    server.send_artifact(self.run_dir / event["path"], event["folder"])
            except Exception as error:
                # Only the artifact, or the whole server? Points must not queue behind one bad file.
                server.status()
                _log.warning(
                    "%s %s does not reach MLflow (%s); it is tried again at the end and by sync",
                    kind,
                    event["path"],
                    redact(str(error)),
                )
                return False
        return True

    def _holds(self, name: str) -> bool:
        """Whether a file, or all of a folder, lies in the run directory, wherever links point."""
        root, path = self.run_dir.resolve(), self.run_dir / name
        found = [path, *(path.rglob("*") if path.is_dir() else ())]
        return all(one.resolve().is_relative_to(root) for one in found)

    def _retry_owed(self, server: Server) -> None:
        state = self._state
        for offset in list(state.pending_artifacts):
            entry = next(read_events(self._spool, offset), None)
            if entry is None or entry.event is None or self._send_event(server, entry.event):
                state.pending_artifacts.remove(offset)
                state.refused += server.take_refused()
                save_sync_state(self.run_dir, self.uri, state)
                self.events_sent += 1


def read_batches(path: Path, offset: int, limit: int) -> Iterator[Batch]:
    """The spool from ``offset`` on as batches of at most ``limit`` points (one event may exceed it)."""
    return group_events(read_events(path, offset), offset, limit)


def group_events(entries: Iterable[Entry], offset: int, limit: int) -> Iterator[Batch]:
    """Events as batches; ``offset`` is where the first begins."""
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
    """The events of a spool between two offsets."""
    count = 0
    for entry in read_events(path, start):
        if end is not None and entry.end > end:
            break
        count += entry.event is not None
    return count


def _points(event: Event) -> list[Point]:
    return [Point(name, float(value), event["t"], event["step"]) for name, value in event["v"].items()]
