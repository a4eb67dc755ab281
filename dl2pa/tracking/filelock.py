"""A lock file between processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator
from pathlib import Path

_held: set[int] = set()


class Busy(RuntimeError):
    """Another process holds the lock."""


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Generator[None]:
    """Hold the lock file ``path``.

    A file system without locks, or one that cannot create the file, is no obstacle: what the lock guards is
    idempotent, the lock only saves work.

    Raises:
        Busy: another process, or another thread of this one, holds it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield
        return
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(str(path)) from error
        except OSError:
            pass
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _forget_in_child() -> None:
    # A forked loader worker shares the lock's open file and would keep it after this process was killed.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
