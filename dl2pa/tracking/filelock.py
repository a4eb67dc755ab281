"""Lock files between processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from dl2pa.osutil import LockResult, try_lock

_held: set[int] = set()


class Busy(RuntimeError):
    """Another process holds the lock."""


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Generator[None]:
    """Hold the lock file ``path`` during the context.

    If the file system does not support locks or cannot create the file, the context runs without a lock: the guarded
    operations are idempotent, and the lock only avoids duplicate work.

    Raises:
        Busy: another process, or another thread of this process, holds the lock.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield
        return
    _held.add(descriptor)
    try:
        if try_lock(descriptor) is LockResult.HELD:
            raise Busy(str(path))
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    # A forked worker shares the open file and would keep the lock after this process is killed.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
