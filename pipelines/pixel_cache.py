"""Memory-mapped files of decoded images, shared by the processes of a node and by later runs."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa import envvars
from dl2pa.osutil import replacing, user_cache_folder

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
"""Called with a text that changes while the work advances."""
Make = Callable[[Progress, bool], NDArray[np.uint8]]
"""Computes the pixels. The second argument tells whether the other processes of the node wait for them."""

_FORMAT = "dl2pa pixels 1"
_SUFFIX = ".pixels"
_HEADER = 4096
"""Bytes before the pixels: one line of JSON, padded with spaces."""
_BLOCK = 1 << 26
"""Bytes written or checked at a time."""
_SPARE = 1 << 28
"""Bytes that writing leaves free on the file system."""
_POLL_S = 0.2
_LOG_EVERY_S = 10.0
_PATIENCE_S = 300.0
"""Seconds without progress after which a process no longer waits for another one."""
_UNUSED_S = 30 * 86400.0
"""Files that no run has opened for this time are removed when another file is written."""


@dataclass(frozen=True)
class PixelFile:
    """A cache file and its expected content.

    Attributes:
        key: digest of everything that the pixels depend on.
        shape: [N, H, W, 3].
        source: folder of the images, for a user who looks into the file.
    """

    path: Path
    key: str
    shape: tuple[int, int, int, int]
    source: str


def cached_pixels(key: str, shape: tuple[int, int, int, int], source: str, make: Make) -> NDArray[np.uint8]:
    """Map the cache file of `key`; if it is missing or damaged, compute the pixels and write it.

    One process computes; the others wait as long as it makes progress. A folder that cannot be written, a full file
    system and a file system without locks only cost the cache.

    Args:
        key, shape, source: see ``PixelFile``.
    """
    folder = cache_folder()
    if folder is None:
        return make(_ignore, False)
    file = PixelFile(folder / f"{key}{_SUFFIX}", key, shape, source)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _Lock(folder / f"{file.path.name}.lock")
    except OSError as error:
        pixels = _read(file)
        if pixels is None:
            _warn_not_cached(file, error)
            pixels = make(_ignore, False)
        return pixels
    with closing(lock):
        return _read_or_make(file, lock, make)


def cache_folder() -> Path | None:
    """Value of DL2PA_CACHE, else ``dl2pa`` in the user's cache folder; None if there is none."""
    chosen = os.environ.get(envvars.CACHE)
    with suppress(RuntimeError):  # the user has no home directory
        if chosen is not None:
            return Path(chosen).expanduser() if chosen else None
        return user_cache_folder()
    return None


def _read_or_make(file: PixelFile, lock: _Lock, make: Make) -> NDArray[np.uint8]:
    inode: int | None = None
    progress, changed, logged = "", time.monotonic(), 0.0
    while True:
        acquired = lock.acquire()
        # Read after the attempt to lock: a process that has just released the lock has written the file.
        with suppress(FileNotFoundError):
            if inode != (current := file.path.stat().st_ino):
                inode = current
                if (pixels := _read(file)) is not None:
                    return pixels
        if acquired:
            return _make_and_write(file, lock, make)
        now = time.monotonic()
        if progress != (current_progress := lock.progress()):
            progress, changed = current_progress, now
        if now - changed > _PATIENCE_S:
            log.warning("no progress for %.0f s (%s): decoding in this process", _PATIENCE_S, progress)
            return make(_ignore, False)
        if now - logged >= _LOG_EVERY_S:
            logged = now
            log.info("waiting for the decoded images (%s)", progress)
        time.sleep(_POLL_S)


def _make_and_write(file: PixelFile, lock: _Lock, make: Make) -> NDArray[np.uint8]:
    pixels = make(lock.report, lock.exclusive)
    try:
        _write(file, pixels, lock.report)
        _remove_unused(file.path.parent)
    except OSError as error:
        _warn_not_cached(file, error)
        return pixels
    written = _read(file)
    return pixels if written is None else written


def _read(file: PixelFile) -> NDArray[np.uint8] | None:
    """Map a file and check all of it; None if it is missing, damaged or has other content."""
    try:
        with file.path.open("rb") as stored:
            header: Any = json.loads(stored.read(_HEADER))
            size = os.fstat(stored.fileno()).st_size
            if size != _HEADER + math.prod(file.shape):
                raise ValueError(f"it has {size:,} bytes")
            # Copy on write: torch warns about arrays that cannot be written. Unwritten pages stay shared.
            pixels = np.asarray(np.memmap(stored, np.uint8, "c", _HEADER, file.shape))
        if header != _header(file, _checksum(pixels)):
            raise ValueError("its checksum or description differs")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("the cache file %s is not usable: %s", file.path, error)
        return None
    with suppress(OSError):
        os.utime(file.path)  # the time of the last use
    log.info("decoded images read from %s", file.path)
    return pixels


def _write(file: PixelFile, pixels: NDArray[np.uint8], progress: Progress) -> None:
    """Write a file atomically.

    Raises:
        OSError: it cannot be written, or would fill the file system.
    """
    free = shutil.disk_usage(file.path.parent).free
    if free < pixels.nbytes + _SPARE:
        raise OSError(errno.ENOSPC, f"only {free >> 20:,} MiB are free")
    content = memoryview(pixels.reshape(-1))  # pyright: ignore[reportArgumentType]
    checksum = 0
    with replacing(file.path) as temporary, temporary.open("wb") as out:
        out.write(b" " * _HEADER)
        for start in range(0, len(content), _BLOCK):
            block = content[start : start + _BLOCK]
            out.write(block)
            checksum = zlib.crc32(block, checksum)
            progress(f"written {start + len(block):,} of {len(content):,} bytes")
        out.seek(0)
        out.write(json.dumps(_header(file, checksum)).encode().ljust(_HEADER - 1)[: _HEADER - 1] + b"\n")


def _header(file: PixelFile, checksum: int) -> dict[str, Any]:
    source = file.source[:1000]
    return {"format": _FORMAT, "key": file.key, "shape": [*file.shape], "crc32": checksum, "source": source}


def _checksum(pixels: NDArray[np.uint8]) -> int:
    content, checksum = memoryview(pixels.reshape(-1)), 0  # pyright: ignore[reportArgumentType]
    for start in range(0, len(content), _BLOCK):
        checksum = zlib.crc32(content[start : start + _BLOCK], checksum)
    return checksum


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - _UNUSED_S
    for path in (*folder.glob(f"*{_SUFFIX}"), *folder.glob(f"*{_SUFFIX}.lock")):
        with suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def _warn_not_cached(file: PixelFile, error: OSError) -> None:
    log.warning(
        "the decoded images are not cached in %s (%s): every start decodes them again. "
        "Set %s to a folder with %s MiB of free space.",
        file.path.parent,
        error.strerror,
        envvars.CACHE,
        f"{(math.prod(file.shape) + _SPARE >> 20) + 1:,}",
    )


def _ignore(text: str) -> None:
    """Progress that no process waits for."""


class _Lock:
    """Lock file whose content is the progress of the process that holds it.

    Attributes:
        exclusive: False if the file system does not support locks.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.exclusive = True

    def acquire(self) -> bool:
        """Take the lock if no other process holds it; without support for locks, every process may go on."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            self.exclusive = False
        return True

    def report(self, text: str) -> None:
        with suppress(OSError):  # a full file system
            content = f"process {os.getpid()} on {socket.gethostname()}: {text}".encode()
            os.ftruncate(self._descriptor, os.pwrite(self._descriptor, content, 0))

    def progress(self) -> str:
        return os.pread(self._descriptor, 1000, 0).decode(errors="replace")

    def close(self) -> None:
        os.close(self._descriptor)
