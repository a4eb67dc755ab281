"""Lock for importing MLflow in the sending thread while training may fork."""

from __future__ import annotations

import contextlib
import os
import threading

# A process forked during an import in another thread inherits a locked import lock, so a fork waits for this lock.
_importing = threading.RLock()
_forks: list[bool] = []


def importing() -> contextlib.AbstractContextManager[bool]:
    """Return the lock to hold while importing MLflow modules."""
    return _importing


def _before_fork() -> None:
    # With a timeout, because the fork may happen inside an import that the other thread waits for.
    _forks.append(_importing.acquire(timeout=10))


def _after_fork() -> None:
    if _forks.pop():
        _importing.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
