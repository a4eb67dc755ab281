from __future__ import annotations

import time

import pytest
import torch

from dl2pa.training.timer import StepTimer, StepTimings


def test_percentiles_of_a_step_are_those_of_the_sorted_durations() -> None:
    durations = [(i + 1) / 1000 for i in range(101)]
    found = StepTimings(1.0, 0, durations[::-1]).step_percentiles()
    assert found == {
        "step_ms_p50": pytest.approx(51),
        "step_ms_p90": pytest.approx(91),
        "step_ms_p99": pytest.approx(100),
    }
    assert StepTimings(1.0, 0, []).step_percentiles() == {}


def test_what_lies_between_steps_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    window = StepTimer(torch.device("cpu"))
    window.open()
    for waited, computed in ((1.0, 2.0), (0.5, 3.0)):
        now[0] += waited
        window.got_data()
        now[0] += computed
        window.stepped(8)
        now[0] += 10.0  # a matching, a checkpoint
        window.asks_data()
    assert window.take_waited() == 1.5
    window.close()
    passed = window.read()
    assert (passed.steps, passed.images, passed.seconds) == ([3.0, 3.5], 16, 26.5)
    assert window.read().steps == []


def test_on_a_gpu_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
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
    window = StepTimer(torch.device("cuda"))
    for _ in range(2):
        window.open()
        for _ in range(3):
            window.got_data()
            window.stepped(4)
            window.asks_data()
        assert "wait" not in calls
        window.close()
        assert window.read().steps == [0.005] * 3
        assert calls.count("wait") == 1
        calls.remove("wait")
    assert calls.count("made") <= 8, "events are used again"
