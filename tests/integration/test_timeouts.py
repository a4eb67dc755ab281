"""A process that is stuck keeps the others no longer than `launch.step_timeout_s`."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

PATIENCE_S = 6


def test_a_stuck_process_ends_the_run_once_steps_are_expected_promptly(train: Any, helpers: Any) -> None:
    changes = {"train": {"epochs": 50}, "launch": {"step_timeout_s": PATIENCE_S}}
    training = train(2, "stuck", changes)
    started = training.start()
    training.wait_for_step(started, 20, 0)
    stuck = next(p for p in helpers.processes_of(training.run) if p.rank == 1)
    os.kill(stuck.pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        code = started.wait()  # its deadline is far below launch.timeout_s
    finally:
        os.kill(stuck.pid, signal.SIGCONT) if started.running() else None
    assert code == 1, started.error
    assert time.monotonic() - began >= PATIENCE_S - 1
    assert "rank 0" in started.error
    training.assert_gone()
