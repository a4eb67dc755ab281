from __future__ import annotations

import time

import pytest
import torch

from dl2pa.training.timer import StepTimer, StepTimings


def test_step_percentiles_are_in_milliseconds() -> None:
    durations = [(i + 1) / 1000 for i in range(101)]
    percentiles = StepTimings(1.0, 0, durations[::-1]).step_percentiles()
    assert percentiles == {
        "step_ms_p50": pytest.approx(51),
        "step_ms_p90": pytest.approx(91),
        "step_ms_p99": pytest.approx(100),
    }
    assert StepTimings(1.0, 0, []).step_percentiles() == {}


def test_time_between_steps_is_excluded_from_step_durations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = StepTimer(torch.device("cpu"))
    timer.start()
    for wait, compute in ((1.0, 2.0), (0.5, 3.0)):
        now[0] += wait
        timer.data_received()
        now[0] += compute
        timer.step_done(8)
        now[0] += 10.0  # an assignment update, a checkpoint
        timer.data_requested()
    assert timer.take_data_wait() == 1.5
    timer.pause()
    timings = timer.read()
    assert (timings.steps, timings.images, timings.seconds) == ([3.0, 3.5], 16, 26.5)
    assert timer.read().steps == []


def test_gpu_steps_do_not_synchronize(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            calls.append("made")

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = StepTimer(torch.device("cuda"))
    for _ in range(2):
        timer.start()
        for _ in range(3):
            timer.data_received()
            timer.step_done(4)
            timer.data_requested()
        assert "wait" not in calls
        timer.pause()
        assert timer.read().steps == [0.005] * 3
        assert calls.count("wait") == 1
        calls.remove("wait")
    assert calls.count("made") <= 8, "events are reused"
