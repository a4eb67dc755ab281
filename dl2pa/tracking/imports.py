"""Importing MLflow from the sending thread while the training may fork."""

from __future__ import annotations

import contextlib
import os
import threading

# A process forked amid another thread's import inherits that module's lock for ever: a fork waits for ours.
_importing = threading.RLock()
_forks: list[bool] = []


def importing() -> contextlib.AbstractContextManager[bool]:
    """The lock to hold while MLflow's modules are imported."""
    return _importing


def _before_fork() -> None:
    # Not for ever: the fork may itself happen inside an import that ours waits for.
    _forks.append(_importing.acquire(timeout=10))


def _after_fork() -> None:
    if _forks.pop():
        _importing.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
