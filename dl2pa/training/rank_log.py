"""Log file of a rank, to which every attempt appends."""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from dl2pa import envvars, fence
from dl2pa.console import SafeFormatter
from dl2pa.osutil import full_disk, open_private, reason_of
from dl2pa.rundir import ATTEMPT_LINE, RunDirectory

log = logging.getLogger(__name__)


class _RankLog(logging.FileHandler):
    """Log file of a rank. Failing to write it prints one message."""

    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        fence.check(Path(self.baseFilename), fresh=False)
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            path = Path(self.baseFilename)
            reason = reason_of(full_disk(error, path.parent, 0) or error)
            sys.stderr.write(f"dl2pa: {path} cannot be written ({reason}); training continues\n")


def log_to_file(run: RunDirectory, rank: int) -> logging.Handler:
    """Write this rank's log to its file; on ranks other than 0 also redirect stdout and stderr there.

    Returns:
        The handler of the file.
    """
    path = run.rank_log(rank)
    open_private(path, "a").close()
    handler = _RankLog(path, encoding="utf-8")
    handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    if rank != 0:
        for other in list(root.handlers):
            if other is not handler:
                root.removeHandler(other)
        target = path.open("a", encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
    return handler


def log_attempt(rank: int, attempt: int) -> None:
    """Log the line that separates the attempts in a log; `dl2pa logs --attempt` searches for it."""
    host = os.environ.get(envvars.NODE_NAME) or socket.gethostname()
    log.info("%s%d: rank %d, process %d on %s", ATTEMPT_LINE, attempt, rank, os.getpid(), host)


def log_error(file: logging.Handler, text: str) -> None:
    """Write why an attempt ended to the log of this rank, because a later attempt replaces its error report."""
    with suppress(MemoryError):
        file.handle(logging.LogRecord(__name__, logging.ERROR, "", 0, "%s", (text,), None))
