"""Background thread that sends the spool to the server during training."""

from __future__ import annotations

import logging
import random
import threading

from dl2pa.redaction import redact
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.delivery import Delivery
from dl2pa.tracking.filelock import Busy
from dl2pa.tracking.refusal import brief, refusal
from dl2pa.tracking.server import RunDeleted

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
_MAX_BACKOFF_AT_END = 2.0


class Sender(threading.Thread):
    """Send new events every second; back off from 1 to 60 s while the server does not answer.

    A daemon thread, so that a hanging server does not keep the process alive. It keeps no events in memory.
    """

    def __init__(self, delivery: Delivery) -> None:
        super().__init__(name="dl2pa-tracking", daemon=True)
        self._delivery = delivery
        self._finishing = threading.Event()
        self._quit = threading.Event()
        self._ended = threading.Event()
        self._failures = 0

    def finish(self, drain_seconds: float) -> bool:
        """Send the remaining events for at most ``drain_seconds``; return whether all were sent."""
        self._finishing.set()
        self._ended.wait(drain_seconds)
        # The thread logs nothing from here on: logging while Python shuts down can abort the process.
        self._quit.set()
        return self._delivery.is_done(with_pending=True)

    def run(self) -> None:
        try:
            while not self._quit.is_set():
                finishing = self._finishing.is_set()
                pause = self._step(finishing)
                if pause is None:
                    return
                (self._quit if finishing else self._finishing).wait(pause)
        finally:
            self._ended.set()

    def _step(self, finishing: bool) -> float | None:
        """Try to send once; return the seconds to wait before the next try, None to end the thread."""
        try:
            self._delivery.send(with_pending=finishing, halt=self._quit.is_set)
        except Busy:
            return POLL_SECONDS
        except RunDeleted as error:
            self._warn("%s; events are kept in the run directory", error)
            return None
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                refused = refusal(error)
                self._warn(
                    "MLflow at %s %s (%s); training continues, events are kept in %s",
                    redact(self._delivery.uri),
                    "refuses the events" if refused else "cannot be reached",
                    refused or brief(error),
                    RunDirectory(self._delivery.run_dir).events,
                )
            return _backoff(self._failures, _MAX_BACKOFF_AT_END if finishing else MAX_BACKOFF_SECONDS)
        if self._failures and self._delivery.run_id is not None:
            self._warn("MLflow at %s answers again", redact(self._delivery.uri))
        self._failures = 0
        return None if finishing else POLL_SECONDS

    def _warn(self, message: str, *values: object) -> None:
        if not self._quit.is_set():
            _log.warning(message, *values)


def _backoff(failures: int, longest: float) -> float:
    seconds = min(longest, 2.0 ** min(failures - 1, 10))
    return seconds * random.uniform(0.8, 1.0)
