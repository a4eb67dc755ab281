"""Threads that read files, and what is known of a read that does not come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class StalledRead(TimeoutError):
    """A file system that does not answer; the text names the file."""


class ReadingPool:
    """A pool of daemon threads.

    ``ThreadPoolExecutor`` joins its threads when the interpreter ends: one that hangs in a read would keep the
    process alive for ever.
    """

    def __init__(self, threads: int) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = threads
        self._closed = False
        for i in range(threads):
            threading.Thread(target=self._work, name=f"dl2pa-read-{i}", daemon=True).start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` in one of the threads."""
        future: Future[T] = Future()
        self._jobs.put((future, call))
        return future

    def close(self) -> None:
        """End the threads when what they are at is done; what has not begun never runs."""
        self._closed = True
        for _ in range(self._threads):
            self._jobs.put(None)

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


class UnderWay:
    """The reads going on at this moment."""

    def __init__(self) -> None:
        self._reads: dict[int, tuple[int, float]] = {}

    @contextmanager
    def read(self, sample: int) -> Generator[None]:
        """Around the reading of a sample."""
        me = threading.get_ident()
        self._reads[me] = (sample, time.monotonic())
        try:
            yield
        finally:
            del self._reads[me]

    def longer_than(self, seconds: float) -> list[tuple[int, float]]:
        """(sample, seconds so far) of the reads that have taken longer, the longest first."""
        now = time.monotonic()
        found = [(sample, now - since) for sample, since in list(self._reads.values())]
        return sorted((f for f in found if f[1] >= seconds), key=lambda f: -f[1])


def describe_stall(path: Path, seconds: float) -> str:
    """One sentence for a read that has not come back."""
    return f"reading {path} has not come back for {seconds:.0f} s: its file system hangs"
