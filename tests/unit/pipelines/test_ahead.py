"""Iterating ahead in a thread: order, bounds, exceptions, abandoned iterations, signals, fork and exit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.ahead import AheadThread

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT = 60


@pytest.fixture
def ahead() -> Iterator[AheadThread]:
    thread = AheadThread("test-ahead")
    yield thread
    assert thread.close()


class Counting:
    """Counts from 0; records what the thread has begun to produce, and whether it has left the iterator."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.produced = 0
        self.begun = threading.Condition()
        self.left = threading.Event()

    def __call__(self) -> Iterator[int]:
        try:
            for i in range(self.end):
                with self.begun:
                    self.produced += 1
                    self.begun.notify_all()
                yield i
        finally:
            self.left.set()

    def wait_for(self, count: int) -> None:
        with self.begun:
            assert self.begun.wait_for(lambda: self.produced >= count, TIMEOUT)


def test_items_arrive_in_order_and_iterations_can_repeat(ahead: AheadThread) -> None:
    for _ in range(3):
        assert list(ahead.iterate(lambda: iter(range(50)))) == list(range(50))
    assert list(ahead.iterate(lambda: iter(()))) == []


def test_thread_is_ahead_by_a_bounded_number_of_items(ahead: AheadThread) -> None:
    """One item is ready and one is waiting for its place."""
    items = Counting(100)
    iteration = ahead.iterate(items)
    for i in range(5):
        assert next(iteration) == i
        items.wait_for(i + 2)
        assert items.produced <= i + 3
    iteration.close()  # type: ignore[attr-defined]


def test_exception_is_raised_after_the_items_before_it(ahead: AheadThread) -> None:
    def failing() -> Iterator[int]:
        yield from range(3)
        raise KeyError("damaged")

    seen: list[int] = []
    with pytest.raises(KeyError, match="damaged"):
        for item in ahead.iterate(failing):
            seen.append(item)  # list.extend keeps nothing after an exception
    assert seen == [0, 1, 2]
    with pytest.raises(SystemExit):
        list(ahead.iterate(lambda: (_ for _ in [sys.exit(3)])))
    assert list(ahead.iterate(lambda: iter("ab"))) == ["a", "b"]


def test_abandoned_iteration_leaves_its_iterator(ahead: AheadThread) -> None:
    items = Counting(100)
    iteration = ahead.iterate(items)
    next(iteration)
    del iteration
    assert items.left.wait(TIMEOUT)
    assert items.produced < 5


def test_new_iteration_ends_one_that_is_still_referenced(ahead: AheadThread) -> None:
    items = Counting(100)
    old = ahead.iterate(items)
    next(old)
    assert list(ahead.iterate(lambda: iter("ab"))) == ["a", "b"]
    assert items.left.is_set()
    with pytest.raises(RuntimeError, match="later iteration"):
        next(old)


def test_consumer_of_a_closed_thread_gets_an_error() -> None:
    thread = AheadThread("test-ahead")
    iteration = thread.iterate(Counting(100))
    next(iteration)
    assert thread.close()
    with pytest.raises(RuntimeError):
        next(iteration)


def test_signal_handlers_run_while_the_consumer_waits(ahead: AheadThread) -> None:
    """The thread sends a signal and produces its item only after the handler has run in the main thread."""
    handled = threading.Event()
    before = signal.signal(signal.SIGUSR2, lambda *_: handled.set())

    def items() -> Iterator[bool]:
        os.kill(os.getpid(), signal.SIGUSR2)
        yield handled.wait(TIMEOUT)

    try:
        assert list(ahead.iterate(items)) == [True]
    finally:
        signal.signal(signal.SIGUSR2, before)


def _in_fork(thread: AheadThread, iteration: Iterator[int]) -> None:
    for attempt in (lambda: next(iteration), lambda: list(thread.iterate(lambda: iter("ab")))):
        with pytest.raises(RuntimeError, match="does not exist in this process"):
            attempt()
    thread.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_process_gets_an_error_instead_of_waiting(ahead: AheadThread) -> None:
    iteration = ahead.iterate(Counting(100))
    next(iteration)
    child = multiprocessing.get_context("fork").Process(target=_in_fork, args=(ahead, iteration))
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == 0
    assert next(iteration) == 1


EXITS = """
import sys
from pathlib import Path
import torch
from pipelines.build import build_pipeline
from pipelines.datasets.folder import index_folder
from pipelines.sampler import TrainSampler
from pipelines.transforms import Transforms
table = index_folder(Path(sys.argv[1]), None, "data.root")
pipeline = build_pipeline(table, Transforms(16, train=True), TrainSampler(200, 2, 0), loader="dali", seed=0,
    device=torch.device("cpu"), threads=2)
iteration = iter(pipeline)
next(iteration)
"""


def test_process_exits_cleanly_in_the_middle_of_an_iteration(folder: object) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    root = folder(200).root  # type: ignore[operator]
    command = [sys.executable, "-c", EXITS, str(root)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
