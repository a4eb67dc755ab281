"""What training calls: record events, never wait, never fail."""

from __future__ import annotations

import functools
import getpass
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

from dl2pa.redaction import redact
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
    """Turn whatever goes wrong in a recording method into one warning a method."""

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
    """Records one attempt of a run: to the spool in the run directory, and from there to MLflow.

    Every event is on disk when a method returns; a background thread sends it. No method waits for a server
    or raises; a disabled tracker writes nothing.

    Args:
        run_dir: the run directory; the spool is ``run_dir/events``.
        enabled: whether to record at all.
        uri: the MLflow server or store; None records to the spool only, for ``dl2pa sync`` to send.
        experiment: MLflow experiment; an earlier attempt's is kept.
        run_name: the run's name in MLflow; an earlier attempt's is kept.
        attempt: number of this attempt, from 1.
        drain_seconds: the longest that :meth:`finish` waits for the server.
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
    ) -> None:
        self.enabled = enabled
        self._run_dir = run_dir.absolute()
        self._drain_seconds = drain_seconds
        self._sender: Sender | None = None
        self._delivery: Delivery | None = None
        self._failed: set[str] = set()
        self.finished = False
        if not enabled:
            return
        try:
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
        """The run's own id, the same in all attempts and on all servers (tag ``dl2pa.run_uuid``)."""
        return self._identity.run_uuid if self.enabled else None

    @property
    def created(self) -> int | None:
        """When the run's first attempt began, in milliseconds since 1970."""
        return self._identity.created if self.enabled else None

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id for the run; None until a server answered, in this attempt or an earlier one."""
        return self._delivery.run_id if self._delivery is not None else None

    @property
    def lag(self) -> bool:
        """Whether the server lacks something of what is on disk; False where there is no server."""
        return self.enabled and self._delivery is not None and not self._delivery.is_done(with_pending=False)

    @_never_raises
    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Begin the attempt.

        Args:
            params: the configuration; nested mappings become dotted names. A param recorded by an earlier
                attempt keeps its value, the new one goes to the tag ``dl2pa.changed.<name>``.
            tags: what makes the run findable.
        """
        self._spool.start(self._identity, params, {**_user_tag(), **tags})
        if self._delivery is not None and self._sender is None:
            self._sender = Sender(self._delivery)
            self._sender.start()

    @_never_raises
    def metrics(self, step: int, values: Mapping[str, Any], time_ms: int | None = None) -> None:
        """Record one value for each metric at ``step``, measured now or at ``time_ms``; a (name, step) already
        recorded keeps its value."""
        self._spool.metrics(int(step), values, time_ms)

    @_never_raises
    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or folder of the run directory; it is read when it is sent, so leave it there.

        Args:
            path: in the run directory, absolute or relative to it.
            folder: where to put it among the run's artifacts.
        """
        inside = (self._run_dir / path).resolve().relative_to(self._run_dir.resolve())
        self._spool.event("artifact", path=inside.as_posix(), folder=folder)

    @_never_raises
    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Record the data sets that go in: ``name``, ``digest`` (at most 36 characters), ``context`` (training,
        validation), ``source`` and ``profile``, the last two as JSON."""
        cleaned = [{name: redact(value) for name, value in dataset.items()} for dataset in datasets]
        self._spool.event("inputs", datasets=cleaned)

    @_never_raises
    def model(self, **fields: Any) -> None:
        """Record the finished model; ``dl2pa.tracking.model.log_model`` says with which fields."""
        self._spool.event("model", **fields)

    @_never_raises
    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; the last value wins."""
        self._spool.event("tags", tags=clean_tags(tags))

    @_never_raises
    def finish(
        self, status: Literal["finished", "failed", "stopped"], drain_seconds: float | None = None
    ) -> None:
        """End the attempt, and give the server up to ``drain_seconds`` to take the rest."""
        self.finished = True
        self._spool.event("end", status=status, dropped=self._spool.dropped)
        self._spool.flush()
        self._hand_over(self._spool.take_waiting(), will_repeat=status == "failed")
        self._spool.close()
        if self._spool.dropped:
            _log.warning("%d tracking events were dropped in this attempt", self._spool.dropped)
        if self._sender is None:
            _log.info("events are kept in %s; `dl2pa sync %s` sends them", self._spool.path, self._run_dir)
        elif not self._sender.finish(self._drain_seconds if drain_seconds is None else drain_seconds):
            left, lost = (self._delivery.left(), len(self._delivery.unspooled)) if self._delivery else (0, 0)
            _log.warning(
                "%d events did not reach MLflow; `dl2pa sync %s` sends them%s",
                left,
                self._run_dir,
                f", but for {lost} that the disk did not take either" if lost else "",
            )

    def _hand_over(self, lines: list[bytes], *, will_repeat: bool) -> None:
        """Leave to the sender what the disk never took.

        Not the points of a run that failed: its next attempt repeats steps that no spool knows of.
        """
        if will_repeat:
            kept = [line for line in lines if not line.startswith(b'{"e":"metrics"')]
            self._spool.dropped += len(lines) - len(kept)
            lines = kept
        if lines and self._delivery is None:
            _log.warning("%d tracking events are lost: the disk did not take them", len(lines))
        elif self._delivery is not None:
            self._delivery.unspooled = lines

    def note_failure(self, what: str, error: Exception) -> None:
        """Warn of a failure inside tracking, once a method."""
        level = logging.DEBUG if what in self._failed else logging.WARNING
        self._failed.add(what)
        _log.log(level, "tracking failed in %s (%s); training goes on", what, redact(repr(error)))


def _user_tag() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container whose user has no name
        return {}
