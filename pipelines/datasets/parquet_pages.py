"""Locate the values of a byte-array column in a Parquet file, so that each can be read without its neighbors.

pyarrow reads whole row groups: up to 100 MB for one image. A row group consists of pages, whose headers are structures
in Thrift's compact protocol, followed by the compressed values (parquet.thrift and Encodings.md of the Apache Parquet
format). A page may contain a whole row group too. Snappy compresses each 64 KiB of a page independently, so that a part
of a page can be decompressed; other codecs need the whole page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.spans import CODECS, NONE, SNAPPY, decompress

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY = 0, 2, 3, 8
_CODEC_OF = {"UNCOMPRESSED": "none", "LZ4": "lz4_raw"}  # pyarrow names LZ4_RAW so
_HEADER = 1 << 14
_MAX_HEADER = 1 << 24
_FRAGMENT = 1 << 16
"""Bytes that Snappy compresses independently (kBlockSize of its source code)."""

Read = Callable[[int, int], bytes]
"""Called with (position, size)."""


class Unsupported(Exception):
    """A column in an encoding that cannot be located; the message names it."""


@dataclass(frozen=True)
class Chunk:
    """A column of a row group.

    Attributes:
        start, end: positions of its pages in the file.
        codec: name of its codec, such as ``SNAPPY``.
        max_level: definition level of a value that is not null; 0 if none can be null.
        num_values: its rows.
    """

    start: int
    end: int
    codec: str
    max_level: int
    num_values: int


@dataclass(frozen=True)
class Value:
    """A value and its location: `size` bytes at `start` decompress to `raw_size` bytes with the value at `offset`."""

    data: bytes
    start: int
    size: int
    raw_size: int
    codec: int
    offset: int


@dataclass(frozen=True)
class _Page:
    """Values of a page: decompressed bytes and their location in the file.

    Attributes:
        header: fields of the page header by number.
        levels: definition levels of a page of version 2, stored before `start`.
    """

    kind: int
    header: dict[int, Any]
    levels: bytes
    compressed: bytes
    start: int
    codec: int
    raw: bytes


def values_of(read: Read, chunk: Chunk) -> Iterator[Value | None]:
    """Yield the value of each row, None if it is null; memory for one page and the dictionary.

    Raises:
        Unsupported: an encoding that cannot be located.
        ValueError, OSError, LookupError: the file is damaged.
    """
    dictionary: list[Value] = []
    count = 0
    for page in _pages(read, chunk):
        if page.kind == _DICTIONARY:
            dictionary = list(_plain(page, 0, page.header[7][1]))
            continue
        if count + page.header[8 if page.kind == _DATA_V2 else 5][1] > chunk.num_values:
            raise ValueError(f"more than the {chunk.num_values} values of the column")
        present, position, encoding = _levels(page, chunk.max_level)
        number = int(np.count_nonzero(present))
        if encoding == _PLAIN:
            values = _plain(page, position, number)
        elif encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
            indices = _hybrid(page.raw, position + 1, page.raw[position], number) if number else _NO_INDICES
            values = (dictionary[k] for k in indices.tolist())
        else:
            raise Unsupported(f"the encoding number {encoding}")
        count += len(present)
        yield from (next(values) if p else None for p in present.tolist())
    if count != chunk.num_values:
        raise ValueError(f"{count} of {chunk.num_values} values were found")


_NO_INDICES = np.zeros(0, dtype=np.int64)


def _pages(read: Read, chunk: Chunk) -> Iterator[_Page]:
    name = _CODEC_OF.get(chunk.codec, chunk.codec.lower())
    if name not in CODECS:
        raise Unsupported(f"the codec {chunk.codec}")
    position = chunk.start
    while position < chunk.end:
        header, length = _read_header(read, position, chunk.end)
        start, size, raw_size = position + length, header[3], header[2]
        content = read(start, size)
        if len(content) != size:
            raise ValueError("a page is cut off")
        codec, about = CODECS.index(name), header.get(8, {})
        levels = about.get(5, 0) + about.get(6, 0)
        if not about.get(7, True):
            codec = NONE
        position = start + size
        if header[1] in (_DATA, _DICTIONARY, _DATA_V2):
            stored = content[levels:]
            skipped = _varint(stored, 0)[1] if codec == SNAPPY and stored else 0
            stored = stored[skipped:]
            raw = decompress(stored, codec, raw_size - levels) if stored else b""
            page_start = start + levels + skipped
            yield _Page(header[1], header, content[about.get(6, 0) : levels], stored, page_start, codec, raw)


def _read_header(read: Read, position: int, end: int) -> tuple[dict[int, Any], int]:
    """Fields of a page header, and its length."""
    size = _HEADER
    while True:
        data = read(position, min(size, end - position))
        reader = _Compact(data)
        try:
            return reader.structure(), reader.position
        except IndexError:
            if size > _MAX_HEADER or len(data) < size:
                raise ValueError("a page header is damaged") from None
        size *= 16


def _levels(page: _Page, max_level: int) -> tuple[NDArray[np.bool_], int, int]:
    """Whether each row of a data page has a value, the position of the values, and their encoding."""
    width = max_level.bit_length()
    if page.kind == _DATA_V2:
        about = page.header[8]
        levels = _hybrid(page.levels, 0, width, about[1]) if width else np.zeros(about[1], np.int64)
        return levels == max_level, 0, about[4]
    about = page.header[5]
    if not width:
        return np.ones(about[1], dtype=np.bool_), 0, about[2]
    if about[3] != _RLE:
        raise Unsupported("definition levels that are not run-length encoded")
    length = int.from_bytes(page.raw[:4], "little")
    return _hybrid(page.raw, 4, width, about[1]) == max_level, 4 + length, about[2]


def _plain(page: _Page, position: int, count: int) -> Iterator[Value]:
    """Yield values that are stored one after another, each after its length in four bytes."""
    raw, restarts = page.raw, _restarts(page)
    for _ in range(count):
        low = position + 4
        position = low + int.from_bytes(raw[position:low], "little")
        if position > len(raw):
            raise ValueError("a value is cut off")
        yield _locate(page, restarts, low, position)


def _restarts(page: _Page) -> NDArray[np.int64]:
    """Positions [R, 2] in the decompressed and in the compressed page between which it can be divided."""
    ends = [(0, 0), (len(page.raw), len(page.compressed))]
    if page.codec == SNAPPY:
        ends[1:1] = list(_fragments(page.compressed, len(page.raw)))
    return np.array(ends, dtype=np.int64)


def _fragments(data: bytes, raw_size: int) -> Iterator[tuple[int, int]]:
    """Yield the ends of Snappy's fragments: positions in the decompressed and in the compressed data."""
    raw = position = 0
    while position < len(data):
        tag = data[position]
        kind, number = tag & 3, tag >> 2
        if kind == 0:
            extra = max(0, number - 59)
            if extra:
                number = int.from_bytes(data[position + 1 : position + 1 + extra], "little")
            raw += number + 1
            position += 2 + extra + number
        else:
            raw += (number & 7) + 4 if kind == 1 else number + 1
            position += (2, 3, 5)[kind - 1]
        if raw % _FRAGMENT == 0 and raw < raw_size:
            yield raw, position


def _locate(page: _Page, restarts: NDArray[np.int64], low: int, high: int) -> Value:
    """The value at `low` to `high` of a decompressed page, with the smallest span that decompresses to it."""
    data = page.raw[low:high]
    if page.codec == NONE:
        return Value(data, page.start + low, len(data), len(data), NONE, 0)
    first = int(np.searchsorted(restarts[:, 0], low, "right")) - 1
    last = max(int(np.searchsorted(restarts[:, 0], high, "left")), first)
    (raw_low, start), (raw_high, end) = restarts[first].tolist(), restarts[last].tolist()
    offset, raw_size = low - raw_low, raw_high - raw_low
    if (first, last) != (0, len(restarts) - 1) and not _is_independent(
        page, start, end, raw_size, offset, data
    ):
        offset, start, end, raw_size = low, 0, len(page.compressed), len(page.raw)
    return Value(data, page.start + start, end - start, raw_size, page.codec, offset)


def _is_independent(page: _Page, start: int, end: int, raw_size: int, offset: int, data: bytes) -> bool:
    """Whether a part of a page decompresses to the value; another compressor may refer to bytes before the part."""
    try:
        raw = decompress(page.compressed[start:end], page.codec, raw_size)
    except (OSError, ValueError):
        return False
    return raw[offset : offset + len(data)] == data


def _hybrid(data: bytes, position: int, width: int, count: int) -> NDArray[np.int64]:
    """Decode `count` numbers of `width` bits: runs of equal numbers, and groups of eight packed ones."""
    parts: list[NDArray[np.int64]] = []
    missing = count
    while missing > 0:
        header, position = _varint(data, position)
        if header & 1:
            size = (header >> 1) * width
            packed = np.frombuffer(data, np.uint8, size, position)
            bits = np.unpackbits(packed, bitorder="little").reshape((header >> 1) * 8, width)
            part = bits @ (1 << np.arange(width, dtype=np.int64))
        else:
            size = (width + 7) // 8
            value = int.from_bytes(data[position : position + size], "little")
            part = np.full(min(header >> 1, missing), value, dtype=np.int64)
        if not len(part):
            raise ValueError("an empty run")
        parts.append(part[:missing])
        missing -= len(parts[-1])
        position += size
    return np.concatenate(parts) if parts else _NO_INDICES


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits per byte, the lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


class _Compact:
    """Reads structures in Thrift's compact protocol. Raises IndexError at the end of the data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def structure(self) -> dict[int, Any]:
        """The fields of a structure by number."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = self._value(head & 15)
        return fields

    def _byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1]

    def _unsigned(self) -> int:
        value, self.position = _varint(self._data, self.position)
        return value

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)

    def _bytes(self, size: int) -> bytes:
        self.position += size
        if self.position > len(self._data):
            raise IndexError
        return self._data[self.position - size : self.position]

    def _value(self, kind: int) -> Any:
        match kind:
            case 1 | 2:
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._signed()
            case 7:
                return self._bytes(8)
            case 8:
                return self._bytes(self._unsigned())
            case 9 | 10:
                head = self._byte()
                size = head >> 4 if head >> 4 < 15 else self._unsigned()
                # In a list, a boolean takes a byte.
                return [self._byte() if head & 15 < 3 else self._value(head & 15) for _ in range(size)]
            case 12:
                return self.structure()
            case _:
                raise ValueError(f"a page header has a field of the unknown type {kind}")
