"""Parts of a training step: ranges of the profiler, or times between events."""

from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
from torch.profiler import record_function

from dl2pa import step_parts
from dl2pa.step_parts import EventRanges, part, ranges_from


class CountingEvent:
    """Event of a device whose clock advances by one millisecond per event."""

    clock = itertools.count()

    def record(self) -> None:
        self.time = next(self.clock)

    def elapsed_time(self, end_event: CountingEvent) -> float:
        return end_event.time - self.time


def test_ranges_belong_to_the_profiler_by_default() -> None:
    assert isinstance(part("dl2pa.forward"), record_function)


def test_events_enclose_each_range_and_are_summed_by_name() -> None:
    ranges = EventRanges(CountingEvent)
    with ranges_from(ranges):
        for _ in range(2):
            with part("forward"), part("loss"):
                pass
            with part("backward"):
                pass
    assert ranges.milliseconds() == {"forward": 6, "loss": 2, "backward": 2}


def test_the_factory_is_restored_after_an_error() -> None:
    with suppress(ValueError), ranges_from(EventRanges(CountingEvent)):
        raise ValueError
    assert isinstance(part("x"), record_function)
    assert vars(step_parts)["_factory"] is record_function


def test_a_failed_range_is_not_counted() -> None:
    ranges = EventRanges(CountingEvent)
    with ranges_from(ranges), pytest.raises(ZeroDivisionError), part("forward"):
        _ = 1 / 0
    assert ranges.milliseconds() == {}
