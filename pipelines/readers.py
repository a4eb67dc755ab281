"""Threads that read images, and detection of stalled reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from dl2pa.osutil import start_thread

T = TypeVar("T")


class StalledRead(TimeoutError):
    """A read that exceeded the timeout; the message names the file."""


class ReaderPool:
    """A pool of daemon threads.

    Replaces ``ThreadPoolExecutor``, which joins its threads at interpreter exit, so that a stalled read would block
    the exit.
    """

    def __init__(self, threads: int) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._closed = False
        self._threads = [start_thread(self._work, f"dl2pa-read-{i}") for i in range(threads)]

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue `call` to run in a thread of the pool; return the future of its result."""
        future: Future[T] = Future()
        self._jobs.put((future, call))
        if self._closed:  # the job may be behind the ends of all threads
            future.cancel()
        return future

    def close(self) -> None:
        """Cancel queued jobs; threads end after their current job."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)

    def has_lost_threads(self) -> bool:
        """Whether a thread has ended although the pool is open; its job is then never done."""
        return not self._closed and not all(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            if self._closed or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del job, future, call


class PendingReads:
    """The reads in progress and their start times, at most one read per thread."""

    def __init__(self) -> None:
        self._reads: dict[int, tuple[int, float]] = {}

    def begin(self, sample: int) -> None:
        """Register the read of a sample by the current thread; call ``end`` in any case."""
        self._reads[threading.get_ident()] = (sample, time.monotonic())

    def end(self) -> None:
        """Remove the read of the current thread."""
        del self._reads[threading.get_ident()]

    def longer_than(self, seconds: float) -> list[tuple[int, float]]:
        """Return (sample, elapsed seconds) for each read in progress for at least `seconds`, longest first."""
        now = time.monotonic()
        elapsed = [(sample, now - since) for sample, since in list(self._reads.values())]
        return sorted((read for read in elapsed if read[1] >= seconds), key=lambda read: -read[1])


def describe_stall(path: Path, seconds: float) -> str:
    """Return the error message for a stalled read."""
    return f"reading {path} has not finished after {seconds:.0f} s: its file system does not respond"
