"""Processes wait for a stuck one at most `launch.step_timeout_s`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from support.runs import IN_MEMORY, Training, processes_of

pytestmark = pytest.mark.xdist_group("runs")
STEP_TIMEOUT_S = 6


def test_stuck_process_ends_the_run(train: Callable[..., Training]) -> None:
    changes = {"train": {"epochs": 50}, "launch": {"step_timeout_s": STEP_TIMEOUT_S}, "data": IN_MEMORY}
    training = train(2, "stuck", changes)
    started = training.start()
    training.wait_for_step(started, 20, 0)
    stuck = next(p for p in processes_of(training.run) if p.rank == 1)
    os.kill(stuck.pid, signal.SIGSTOP)
    start = time.monotonic()
    try:
        code = started.wait()  # fails unless this ends well before launch.timeout_s
    finally:
        os.kill(stuck.pid, signal.SIGCONT) if started.running() else None
    assert code == 1, started.error
    assert time.monotonic() - start >= STEP_TIMEOUT_S - 1
    assert "rank 0" in started.error
    training.assert_gone()
