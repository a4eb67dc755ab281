"""Cache of blocks of remote shards on the node, shared by its processes and by later runs.

Each set of objects has two files: the blocks at their positions in a sparse file, and a checksum for each block. A
block counts as present if its checksum is stored and correct, so a crash between two writes only loses that block.
The name of the files covers the ETags of the objects. Blocks are kept until another set needs the space: in shuffled
reading of more data than fits, replacing blocks would save nothing.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.osutil import LockResult, try_lock

log = logging.getLogger(__name__)

BLOCK = 1 << 17
"""Bytes of a block."""

_DATA, _SUMS = ".blocks", ".sums"
_PRESENT = 1 << 32
_COUNT_AGAIN_BYTES = 1 << 26
"""Bytes that a process writes before it measures the size of the cache again."""
_COUNT_AGAIN_S = 30.0
"""Interval at which a process checks a full cache for free space."""
_MIN_SPARE = 1 << 28
_SPARE_FRACTION = 0.05
"""Part of the file system that stays free."""


def cache_of(folder: Path, name: str, count: int, limit: int) -> BlockCache:
    """The cache of this process for one set of objects; see ``BlockCache``."""
    return _cache(folder, name, count, limit, os.getpid())


@functools.cache
def _cache(folder: Path, name: str, count: int, limit: int, pid: int) -> BlockCache:
    return BlockCache(folder, name, count, limit)


class BlockCache:
    """Blocks of one set of objects.

    Args:
        folder: of the cache of this node.
        name: digest of the objects and their ETags.
        count: number of blocks.
        limit: largest number of bytes of all sets in the folder.
    """

    def __init__(self, folder: Path, name: str, count: int, limit: int) -> None:
        self._folder, self._name, self._limit = folder, name, limit
        self._verified = bytearray(count)
        self._sums: NDArray[np.uint64] = np.zeros(count, dtype=np.uint64)
        self._data = self._sums_file = -1
        self._room = 0
        self._counted = 0.0
        self._lock = threading.Lock()
        if limit <= 0 or not count:
            return
        try:
            self._open(count)
        except OSError as error:
            self._data = -1
            log.warning("%s cannot be used (%s): blocks are not cached", folder, error.strerror or error)

    def _open(self, count: int) -> None:
        data = self._folder / f"{self._name}{_DATA}"
        while True:
            self._data = os.open(data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._data, fcntl.LOCK_SH)  # in use: not removed by others
            if os.fstat(self._data).st_nlink:
                break
            os.close(self._data)  # removed between the two calls
        os.utime(self._data)
        sums = data.with_suffix(_SUMS)
        self._sums_file = os.open(sums, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self._sums_file).st_size != 8 * count:
            os.ftruncate(self._sums_file, 8 * count)
        # Read through a mapping and written by calls: writing to a mapping on a full disk would kill the process.
        self._sums = np.memmap(sums, dtype=np.uint64, mode="r", shape=(count,))

    def __contains__(self, block: int) -> bool:
        return bool(self._sums[block])

    def read(self, block: int, size: int, begin: int, end: int) -> bytes | None:
        """Bytes `begin` to `end` - 1 of a block of `size` bytes; None if it is missing or damaged."""
        expected = int(self._sums[block])
        if not expected:
            return None
        with suppress(OSError):
            if self._verified[block]:
                data = os.pread(self._data, end - begin, block * BLOCK + begin)
                if len(data) == end - begin:
                    return data
            data = os.pread(self._data, size, block * BLOCK)
            if len(data) == size and _sum(data) == expected:
                self._verified[block] = 1
                return data[begin:end]
        with suppress(OSError):
            os.pwrite(self._sums_file, bytes(8), 8 * block)
        return None

    def write(self, block: int, data: bytes) -> None:
        """Store a block if there is space."""
        if self._data < 0 or not self._has_room(len(data)):
            return
        try:
            if os.pwrite(self._data, data, block * BLOCK) != len(data):
                raise OSError("incomplete write")
            os.pwrite(self._sums_file, _sum(data).to_bytes(8, "little"), 8 * block)
            self._verified[block] = 1
        except OSError as error:
            log.warning("%s: %s; no more blocks are cached", self._folder, error.strerror or error)
            with self._lock:
                self._room, self._counted = 0, float("inf")

    def _has_room(self, size: int) -> bool:
        with self._lock:
            if self._room < size:
                if time.monotonic() - self._counted < _COUNT_AGAIN_S and self._counted:
                    return False
                self._room = min(self._free(), _COUNT_AGAIN_BYTES)
                # A process that has used up its share looks again at once, one without space later.
                self._counted = time.monotonic() if self._room < size else 0.0
                if self._room < size:
                    return False
            self._room -= size
            return True

    def _free(self) -> int:
        """Bytes that may be written, after the removal of unused sets if there is no space."""
        space = self._space()
        if space < _COUNT_AGAIN_BYTES:
            for file in sorted(self._folder.glob(f"*{_DATA}"), key=_time_of):
                if space >= _COUNT_AGAIN_BYTES:
                    break
                if file.name != f"{self._name}{_DATA}" and _remove_unused(file):
                    space = self._space()
        return max(0, space)

    def _space(self) -> int:
        used = sum(_bytes_of(file) for file in self._folder.glob(f"*{_DATA}"))
        state = os.statvfs(self._folder)
        spare = max(_MIN_SPARE, int(_SPARE_FRACTION * state.f_blocks * state.f_frsize))
        return min(self._limit - used, state.f_bavail * state.f_frsize - spare)

    def close(self) -> None:
        for file in (self._data, self._sums_file):
            if file >= 0:
                os.close(file)
        self._data = self._sums_file = -1


def _sum(data: bytes) -> int:
    return _PRESENT | zlib.crc32(data)


def _bytes_of(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_blocks * 512
    return 0


def _time_of(file: Path) -> float:
    with suppress(OSError):
        return file.stat().st_mtime
    return 0.0


def _remove_unused(file: Path) -> bool:
    """Remove a set that no process uses."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if try_lock(descriptor) is not LockResult.ACQUIRED or not os.fstat(descriptor).st_nlink:
            return False  # used, or removed meanwhile: a new set may have the name
        file.with_suffix(_SUMS).unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)
