"""Read images inside compressed files: each image is in a span of bytes that decompresses independently."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CODECS = ("none", "snappy", "gzip", "zstd", "brotli", "lz4_raw")
"""Names of pyarrow, by number. Never change the numbers: index files store them."""
NONE, SNAPPY = 0, 1
_MAX_CACHED = 64 << 20
"""Decompressed bytes that one process keeps: consecutive images are often in the same span."""


@dataclass(frozen=True, eq=False)
class Spans:
    """Span of each of N images; ``Members`` has its file, and the offset of the image in its decompressed bytes.

    Attributes:
        starts: int64 [N], position of the span in its file.
        sizes: int64 [N], bytes of the span in the file.
        raw_sizes: int64 [N], bytes after decompression.
        codecs: uint8 [N], number in ``CODECS``.
        rows: int64 [N], row of the image in its file.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    raw_sizes: NDArray[np.int64]
    codecs: NDArray[np.uint8]
    rows: NDArray[np.int64]

    def take(self, samples: NDArray[np.int64]) -> Spans:
        """The spans of ``samples`` [M] in that order."""
        return Spans(*(column[samples] for column in vars(self).values()))


def decompress(data: bytes, codec: int, raw_size: int) -> bytes:
    """Decompress a span.

    Raises:
        ValueError, OSError: it is damaged.
    """
    if codec == NONE:
        return data
    import pyarrow

    if codec == SNAPPY:
        data = _varint(raw_size) + data
    stream: Any = pyarrow.Codec(CODECS[codec])
    return stream.decompress(data, decompressed_size=raw_size, asbytes=True)


def _varint(value: int) -> bytes:
    """A number as Snappy writes it before the data: seven bits per byte, the lowest first."""
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])


class SpanCache:
    """Decompressed spans of one process, at most ``_MAX_CACHED`` bytes; the oldest ones are dropped."""

    def __init__(self) -> None:
        self._spans: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[SpanCache], tuple[()]]:
        return SpanCache, ()

    def get(self, key: tuple[int, int, int], make: Callable[[], bytes]) -> bytes:
        """The span `key`, made if it is not in the cache."""
        with self._lock:
            if (span := self._spans.get(key)) is not None:
                self._spans.move_to_end(key)
                return span
        span = make()
        with self._lock:
            if key not in self._spans:
                self._spans[key] = span
                self._size += len(span)
            while self._size > _MAX_CACHED and len(self._spans) > 1:
                self._size -= len(self._spans.popitem(last=False)[1])
        return span
