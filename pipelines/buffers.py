"""Memory for encoded images that is used again: the kernel clears new memory page by page, which costs half a read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 64
_LARGEST = 2**25
"""Larger requests get no buffer; they are rare and would be kept."""
_HEADROOM = 1.25
_KEPT = 2**22
"""Buffers up to this size may be used for any smaller request, larger ones for those of at least a quarter."""


class ReadBuffers:
    """Buffers that return to the pool when the last view of them is freed, in any thread."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def take(self, lengths: Sequence[int]) -> list[memoryview | None]:
        """Writable views of `lengths` bytes in one buffer; all None if they are too large together."""
        ends = np.cumsum([-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths]).tolist()
        if not ends or ends[-1] > _LARGEST:
            return [None] * len(lengths)
        memory = self._memory(ends[-1])
        owner = memory.view()
        weakref.finalize(owner, self._free.append, memory).atexit = False
        view = memoryview(owner)  # pyright: ignore[reportArgumentType]
        starts = [0, *ends[:-1]]
        return [view[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def _memory(self, size: int) -> NDArray[np.uint8]:
        """The buffer freed last, which may be in the cache; a new one if it is too small or far too large."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or not size <= len(memory) <= max(_KEPT, 4 * size):
            memory = np.empty(int(_HEADROOM * size), dtype=np.uint8)
        return memory
