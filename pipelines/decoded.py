"""Decode a data set of small images into one array: in parallel, once per node, with a cache."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from dl2pa.osutil import usable_cores
from pipelines.crop import center_crop, decode_image
from pipelines.datasets.arrays import ArrayDataset
from pipelines.datasets.table import ImageTable
from pipelines.header import image_size
from pipelines.images import BadImage, is_fault_of_process
from pipelines.parallel import in_parallel
from pipelines.pixel_cache import Progress, cached_pixels

log = logging.getLogger(__name__)

_MIN_CACHED = 4096
"""A process decodes fewer images in its threads, without a cache: that takes about a second."""
_CHUNK = 256
"""Images that a worker process decodes at a time."""
_SCAN_THREADS = 16
_LOG_EVERY_S = 10.0


@dataclass(frozen=True)
class _Chunk:
    """Images `start` to `start` + len(images) of a data set."""

    start: int
    images: ImageTable
    side: int
    interpolation: str


def decode_folder(
    dataset: ImageTable, side: int, threads: int, interpolation: str = "bilinear"
) -> ArrayDataset:
    """Decode all images; resize the shorter side and center-crop to `side`.

    Pillow decodes, so that the pixels are those of earlier versions. From 4,096 images on, one process of the node
    decodes in worker processes and writes the pixels to the cache; the other processes wait and map the same file.

    Args:
        threads: threads of this process.
        interpolation: see ``decode_image``.

    Raises:
        UserError: an image cannot be decoded; a data set in memory has no substitutes.
    """

    def decode(progress: Progress, alone: bool) -> NDArray[np.uint8]:
        return _decode(dataset, side, interpolation, usable_cores() if alone else threads, progress)

    if len(dataset) < _MIN_CACHED:
        pixels = decode(lambda text: None, False)
    else:
        shape = (len(dataset), side, side, 3)
        pixels = cached_pixels(_key(dataset, side, interpolation), shape, str(dataset.root), decode)
    return ArrayDataset(pixels, dataset.labels, dataset.classes, dataset.fingerprint)


def _decode(
    dataset: ImageTable, side: int, interpolation: str, workers: int, progress: Progress
) -> NDArray[np.uint8]:
    """All pixels, [N, side, side, 3]; the progress is logged."""
    count = len(dataset)
    chunks = [
        _Chunk(start, replace(part, classes=()), side, interpolation)
        for start in range(0, count, _CHUNK)
        for part in [dataset.subset(np.arange(start, min(start + _CHUNK, count)))]
    ]
    log.info("decoding %s images of %s into memory", f"{count:,}", dataset.root)
    pixels = np.empty((count, side, side, 3), dtype=np.uint8)
    began = reported = time.monotonic()
    done = 0
    for start, part in _decoded(chunks, workers if count >= _MIN_CACHED else 1, workers):
        pixels[start : start + len(part)] = part
        done += len(part)
        now = time.monotonic()
        progress(f"decoded {done:,} of {count:,} images")
        if now - reported >= _LOG_EVERY_S:
            reported = now
            left = (now - began) / done * (count - done)
            log.info("decoded %s of %s images, %.0f s left", f"{done:,}", f"{count:,}", left)
    return pixels


def _decoded(chunks: list[_Chunk], processes: int, threads: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode in processes, or in threads if one process is asked for or processes cannot be used."""
    remaining = {chunk.start: chunk for chunk in chunks}
    if processes > 1:
        try:
            for start, part in in_parallel(_decode_chunk, chunks, min(processes, len(chunks))):
                del remaining[start]
                yield start, part
            return
        except (OSError, BrokenProcessPool) as error:  # no semaphores, or no memory for the processes
            log.warning("cannot decode in parallel processes (%s): decoding in threads", error)
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(_decode_chunk, remaining.values())


def _decode_chunk(chunk: _Chunk) -> tuple[int, NDArray[np.uint8]]:
    chunk.images.will_read(range(len(chunk.images)))
    return chunk.start, np.stack([_decode_one(chunk, i) for i in range(len(chunk.images))])


def _decode_one(chunk: _Chunk, i: int) -> NDArray[np.uint8]:
    images, side = chunk.images, chunk.side
    try:
        data = images.read(i)
        size = np.array([image_size(data)], dtype=np.int64)
        window, resized, offset = (part[0].tolist() for part in center_crop(size, side, side))
        return np.asarray(decode_image(data, window, resized, offset, side, chunk.interpolation))
    except (BadImage, OSError) as error:
        if is_fault_of_process(error):
            raise
        remedy = "Restore or remove it."
        raise UserError("data.root", str(images.path(i)), f"cannot be decoded ({error})", remedy) from None


def _key(dataset: ImageTable, side: int, interpolation: str) -> str:
    """Digest of everything that the pixels depend on: files, their states, size, filter, and version of the decoder."""
    from PIL import Image, features

    decoder = (Image.__version__, features.version("jpg"), features.version("webp"), features.version("zlib"))
    pixels = (side, interpolation, decoder)
    digest = hashlib.sha256(repr((str(dataset.root.resolve()), dataset.fingerprint, *pixels)).encode())
    if dataset.remote is not None:
        digest.update(dataset.remote.identity.encode())
        return digest.hexdigest()[:32]
    paths = [f"{dataset.root}/{name}" for name in dataset.files]
    parts = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        for states in pool.map(_states, parts):
            digest.update(repr(states).encode())
    return digest.hexdigest()[:32]


def _states(paths: list[str]) -> list[tuple[int, ...]]:
    """Size and times of each file. The time of the last status change also shows that a file was replaced."""
    states: list[tuple[int, ...]] = []
    for path in paths:
        try:
            state = Path(path).stat()
        except OSError:  # reported when it is read
            states.append(())
        else:
            states.append((state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return states
