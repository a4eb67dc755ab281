"""A thread that iterates ahead of the step loop, so that decoding and feeding take no time of it."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from dl2pa.osutil import start_thread

T = TypeVar("T")

_CLOSE_S = 10.0
"""Time to wait at the end for the current item; a stalled read may take longer, and is abandoned."""
_ALIVE_S = 1.0
"""Interval at which a waiting consumer checks that the thread exists, and lets Python run the handler of a signal that
arrived just before the wait."""


class AheadThread:
    """A daemon thread that runs one iterator at a time, a bounded number of items ahead.

    At the exit of the interpreter the thread is stopped: a thread in native code would crash it.
    """

    def __init__(self, name: str, depth: int = 1) -> None:
        self._depth = depth
        self._runs: SimpleQueue[_Run[object] | None] = SimpleQueue()
        self._current: _Run[object] | None = None
        self._thread = start_thread(partial(_work, self._runs), name)

    def iterate(self, items: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Yield the items of ``items()``, which runs in the thread; its exception is raised after the last item.

        A new iteration ends the one before.

        Raises:
            RuntimeError: the thread does not exist, as in a forked process; or a later iteration has begun.
        """
        self.stop()
        run: _Run[T] = _Run(items, self._depth, self._thread)
        self._current = run  # pyright: ignore[reportAttributeAccessIssue]
        self._runs.put(run)  # pyright: ignore[reportArgumentType]
        try:
            yield from run
        finally:
            run.stop()

    def stop(self) -> None:
        """End the iteration, if there is one; the thread leaves its iterator after the current item."""
        if self._current is not None:
            self._current.stop()

    def close(self) -> bool:
        """Stop iteration and thread; return whether the thread has left its iterator."""
        self.stop()
        self._runs.put(None)
        return self._current is None or self._current.wait(_CLOSE_S)


def _work(runs: SimpleQueue[_Run[object] | None]) -> None:
    while (run := runs.get()) is not None:
        run.work()
        del run


class _Run(Generic[T]):
    """One iteration: items in order from the thread to its consumer."""

    def __init__(self, items: Callable[[], Iterator[T]], depth: int, thread: threading.Thread) -> None:
        self._items = items
        self._depth = depth
        self._thread = thread
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._left = threading.Event()
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[T]:
        while True:
            self._check_thread()
            with self._changed:
                while not (self._ready or self._left.is_set() or self._stopped):
                    self._changed.wait(_ALIVE_S)
                    self._check_thread()
                if self._stopped:
                    raise RuntimeError("a later iteration over the same pipeline has begun, or it was closed")
                if not self._ready:
                    if self._error is not None:
                        raise self._error
                    return
                item = self._ready.popleft()
                self._changed.notify_all()
            yield item
            del item

    def _check_thread(self) -> None:
        if not self._thread.is_alive():
            raise RuntimeError(f"the thread {self._thread.name} has ended, or does not exist in this process")

    def work(self) -> None:
        """Iterate in the thread until the end, an exception or ``stop``."""
        stop_at_exit = partial(_stop, weakref.ref(self))
        atexit.register(stop_at_exit)
        first = True
        try:
            for item in () if self._stopped else self._items():
                if first:
                    # Again, after the imports of the iterator, so that it runs before their own exit handlers.
                    atexit.unregister(stop_at_exit)
                    atexit.register(stop_at_exit)
                    first = False
                if not self._put(item):
                    break
                del item
        except BaseException as error:
            self._error = error
        finally:
            atexit.unregister(stop_at_exit)
            with self._changed:
                self._left.set()
                self._changed.notify_all()

    def _put(self, item: T) -> bool:
        """Queue an item, or return False if the iteration is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
            if not self._stopped:
                self._ready.append(item)
                self._changed.notify_all()
            return not self._stopped

    def stop(self) -> None:
        """Discard the items; the thread leaves the iterator after its current item."""
        if not self._thread.is_alive():
            return  # in a forked process the lock may be held forever
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until the thread has left the iterator; return whether it has."""
        return self._left.is_set() or (self._thread.is_alive() and self._left.wait(seconds))


def _stop(run: weakref.ref[Any]) -> None:
    if (one := run()) is not None:
        one.stop()
        one.wait(_CLOSE_S)
