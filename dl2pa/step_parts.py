"""Named parts of a training step, recorded for a profiler or timed with events of the device."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch.profiler import record_function

PARTS = tuple(
    f"dl2pa.{part}"
    for part in (
        "data",
        "to_device",
        "mix",
        "forward",
        "loss",
        "backward",
        "optimizer",
        "statistic",
        "average",
    )
)
"""Parts of a step. The trainer records `data`, the pipeline `to_device`; `loss` is part of `forward`."""

RangeFactory = Callable[[str], AbstractContextManager[object]]
_factory: RangeFactory = record_function


def part(name: str) -> AbstractContextManager[object]:
    """Range of one part; by default a range of torch's profiler."""
    return _factory(name)


@contextmanager
def ranges_from(factory: RangeFactory) -> Generator[None]:
    """Create the ranges with `factory` in this context."""
    global _factory
    previous, _factory = _factory, factory
    try:
        yield
    finally:
        _factory = previous


class Event(Protocol):
    """Time stamp on the device, such as `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class EventRanges:
    """Ranges timed by an event before and one after each.

    The events enclose every kernel of the range on its stream, also those that another thread launches: autograd
    launches the backward kernels in a thread of its own, which ranges of the profiler do not cover.
    """

    def __init__(self, new_event: Callable[[], Event]) -> None:
        self._new_event = new_event
        self._ranges: list[tuple[str, Event, Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        start, end = self._new_event(), self._new_event()
        start.record()
        yield
        end.record()
        self._ranges.append((name, start, end))

    def milliseconds(self) -> dict[str, float]:
        """Sum of the times per name; the device must have passed all events."""
        times: dict[str, float] = {}
        for name, start, end in self._ranges:
            times[name] = times.get(name, 0.0) + start.elapsed_time(end)
        return times
