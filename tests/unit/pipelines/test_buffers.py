"""Memory for encoded images that is used again."""

from __future__ import annotations

import numpy as np

from pipelines.buffers import ReadBuffers


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def taken(buffers: ReadBuffers, *lengths: int) -> list[memoryview]:
    views = buffers.take(lengths)
    return [view for view in views if view is not None]


def test_memory_is_used_again_after_its_last_view() -> None:
    buffers = ReadBuffers()
    first, second = taken(buffers, 1000, 500)
    start = address(first)
    kept = np.frombuffer(second, np.uint8)[3:]
    del first, second
    (other,) = taken(buffers, 1500)
    assert address(other) != start
    del kept
    (again,) = taken(buffers, 1500)
    assert address(again) == start


def test_views_have_their_lengths_and_do_not_overlap() -> None:
    views = taken(ReadBuffers(), 1, 100, 0, 64)
    assert [len(view) for view in views] == [1, 100, 0, 64]
    for number, view in enumerate(views):
        view[:] = bytes([number]) * len(view)
    assert [set(view) for view in views] == [{0}, {1}, set(), {3}]


def test_memory_that_is_too_small_or_far_too_large_is_replaced() -> None:
    buffers = ReadBuffers()
    for length in (1000, 10_000_000, 1000):
        (view,) = taken(buffers, length)
        assert view.nbytes == length
        owner = np.frombuffer(view, np.uint8).base
        assert isinstance(owner, memoryview)
        assert len(owner.obj.base) < 2 * length  # type: ignore[attr-defined]
        del view, owner


def test_a_very_large_request_gets_no_buffer() -> None:
    assert ReadBuffers().take([2**28, 5]) == [None, None]
    assert ReadBuffers().take([]) == []
