"""The tracking interface of training; its methods never wait for a server and never raise."""

from __future__ import annotations

import functools
import getpass
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

from dl2pa.redaction import redact
from dl2pa.tracking.copies import detach_copy
from dl2pa.tracking.delivery import Delivery
from dl2pa.tracking.sanitize import clean_tags
from dl2pa.tracking.sender import Sender
from dl2pa.tracking.server import set_client_defaults
from dl2pa.tracking.spool import Spool, ensure_identity

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")


def _never_raises(
    method: Callable[Concatenate[Tracker, _P], None],
) -> Callable[Concatenate[Tracker, _P], None]:
    """Turn exceptions of a recording method into one warning per method."""

    @functools.wraps(method)
    def guarded(self: Tracker, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if not self.enabled:
            return
        if self.finished:
            self.note_failure(method.__name__, RuntimeError("the attempt has ended"))
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.note_failure(method.__name__, error)

    return guarded


class Tracker:
    """Record one attempt of a run to the spool in the run directory, and from there to MLflow.

    Each method returns after the event is written to disk; a background thread sends it. No method waits for a
    server or raises. A disabled tracker writes nothing.

    Args:
        run_dir: the run directory; the spool is ``run_dir/events``.
        enabled: whether to record events.
        uri: the MLflow server or store; with None, events stay in the spool until ``dl2pa sync`` sends them.
        experiment: MLflow experiment; the one of an earlier attempt takes precedence.
        run_name: name of the run in MLflow; the one of an earlier attempt takes precedence.
        attempt: number of this attempt, from 1.
        drain_seconds: maximum time that :meth:`finish` waits for the server.
        sync_command: command that sends the events later, for the log; by default ``dl2pa sync RUN``.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        enabled: bool,
        uri: str | None,
        experiment: str,
        run_name: str,
        attempt: int,
        drain_seconds: float = 30,
        sync_command: str | None = None,
    ) -> None:
        self.enabled = enabled
        self._run_dir = run_dir.absolute()
        self._drain_seconds = drain_seconds
        self._sync_command = sync_command or f"dl2pa sync {self._run_dir}"
        self._sender: Sender | None = None
        self._delivery: Delivery | None = None
        self._failed: set[str] = set()
        self.finished = False
        if not enabled:
            return
        try:
            detach_copy(self._run_dir)
            self._spool = Spool(self._run_dir, attempt)
            self._identity = ensure_identity(self._run_dir, experiment, run_name)
            if uri is not None:
                set_client_defaults()
                self._delivery = Delivery(self._run_dir, uri)
                self._delivery.identity = self._identity
        except Exception as error:
            self.enabled = False
            self.note_failure("start", error)

    @property
    def run_uuid(self) -> str | None:
        """Id of the run, the same in all attempts and on all servers (tag ``dl2pa.run_uuid``)."""
        return self._identity.run_uuid if self.enabled else None

    @property
    def created(self) -> int | None:
        """Start time of the first attempt, in milliseconds since 1970."""
        return self._identity.created if self.enabled else None

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id of the run; None until a server has answered, in this attempt or an earlier one."""
        return self._delivery.run_id if self._delivery is not None else None

    @_never_raises
    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record the start of the attempt.

        Args:
            params: the configuration; nested mappings become dotted names. A param of an earlier attempt keeps
                its value; a different new value becomes the tag ``dl2pa.changed.<name>``.
            tags: tags for searching runs.
        """
        self._spool.start(self._identity, params, {**_user_tag(), **tags})
        if self._delivery is not None and self._sender is None:
            sender = Sender(self._delivery)
            sender.start()  # fails if there is too little memory; `dl2pa sync` then sends the events
            self._sender = sender

    @_never_raises
    def metrics(self, step: int, values: Mapping[str, Any], time_ms: int | None = None) -> None:
        """Record one value per metric at ``step``, measured now or at ``time_ms``.

        A (name, step) that is already recorded keeps its value.
        """
        self._spool.metrics(int(step), values, time_ms)

    @_never_raises
    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or folder of the run directory; it must stay there until it is sent.

        Args:
            path: path in the run directory, absolute or relative to it.
            folder: folder among the artifacts of the run.
        """
        inside = (self._run_dir / path).resolve().relative_to(self._run_dir.resolve())
        self._spool.event("artifact", path=inside.as_posix(), folder=folder)

    @_never_raises
    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Record the input data sets.

        Args:
            datasets: mappings of ``name``, ``digest`` (at most 36 characters), ``context`` (training, validation),
                ``source`` and ``profile``; the last two are JSON texts.
        """
        redacted = [{name: redact(value) for name, value in dataset.items()} for dataset in datasets]
        self._spool.event("inputs", datasets=redacted)

    @_never_raises
    def model(self, **fields: Any) -> None:
        """Record the finished model; the fields are those of the event in ``dl2pa.tracking.model.log_model``."""
        self._spool.event("model", **fields)

    @_never_raises
    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; the last value wins."""
        self._spool.event("tags", tags=clean_tags(tags))

    @_never_raises
    def finish(
        self, status: Literal["finished", "failed", "stopped"], drain_seconds: float | None = None
    ) -> None:
        """Record the end of the attempt and wait up to ``drain_seconds`` for the remaining events to be sent."""
        self.finished = True
        self._spool.event("end", status=status, dropped=self._spool.dropped)
        self._spool.flush()
        self._hand_over(self._spool.take_waiting(), drop_metrics=status == "failed")
        self._spool.close()
        if self._spool.dropped:
            _log.warning("%d tracking events were dropped in this attempt", self._spool.dropped)
        if self._sender is None:
            _log.info("events are in %s; `%s` sends them", self._spool.path, self._sync_command)
        elif not self._sender.finish(self._drain_seconds if drain_seconds is None else drain_seconds):
            left, lost = (self._delivery.left(), len(self._delivery.unspooled)) if self._delivery else (0, 0)
            exception = f", except {lost} that could not be written to disk" if lost else ""
            message = "%d events were not sent to MLflow; `%s` sends them%s"
            _log.warning(message, left, self._sync_command, exception)

    def _hand_over(self, lines: list[bytes], *, drop_metrics: bool) -> None:
        """Give the sender the lines that could not be written to disk.

        Metrics of a failed run are dropped: its next attempt repeats those steps and records them again.
        """
        if drop_metrics:
            kept = [line for line in lines if not line.startswith(b'{"e":"metrics"')]
            self._spool.dropped += len(lines) - len(kept)
            lines = kept
        if lines and self._delivery is None:
            _log.warning("%d tracking events are lost because they could not be written to disk", len(lines))
        elif self._delivery is not None:
            self._delivery.unspooled = lines

    def note_failure(self, what: str, error: Exception) -> None:
        """Log a failure of tracking; a warning once per method."""
        level = logging.DEBUG if what in self._failed else logging.WARNING
        self._failed.add(what)
        _log.log(level, "tracking failed in %s (%s); training continues", what, redact(repr(error)))


def _user_tag() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # the user of a container may have no name
        return {}
