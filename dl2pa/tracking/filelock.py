"""Lock files between processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from dl2pa.osutil import LockResult, open_and_lock, remove_locked

_held: set[int] = set()


class Busy(RuntimeError):
    """Another process holds the lock."""


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Generator[None]:
    """Hold the lock file ``path`` during the context, at whose end it is removed.

    If the file system does not support locks or cannot create the file, the context runs without a lock: the guarded
    operations are idempotent, and the lock only avoids duplicate work.

    Raises:
        Busy: another process, or another thread of this process, holds the lock.
    """
    try:
        descriptor, result = open_and_lock(path)
    except OSError:
        yield
        return
    _held.add(descriptor)
    try:
        if result is LockResult.HELD:
            raise Busy(str(path))
        yield
    finally:
        if result is LockResult.ACQUIRED:
            remove_locked(path, descriptor)
        _held.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    # A forked worker shares the open file and would keep the lock after this process is killed.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
