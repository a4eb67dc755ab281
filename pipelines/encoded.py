"""Reading encoded images ahead of the decoder, with unreadable ones replaced by a deterministic substitute."""

from __future__ import annotations

import io
import logging
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.folder import FolderDataset
from pipelines.draws import Stream, below
from pipelines.recipe import Plan, Recipe, draw_plan

log = logging.getLogger(__name__)

_AHEAD = 3
_MOST_SUBSTITUTES = 100
_MOST_PIXELS = 178_956_970  # PIL's bound: a header that claims more is damaged or hostile


class BadImage(Exception):
    """One image that cannot be decoded; the text says why."""


@dataclass(frozen=True)
class Encoded:
    """One rank's share of a step before decoding: files as bytes, and what to do with them."""

    epoch: int
    step: int
    data: list[NDArray[np.uint8]]
    plan: Plan
    samples: NDArray[np.int64]


class ImageReader:
    """Bytes and size of a sample's image; keeps account of the unreadable ones."""

    def __init__(self, dataset: FolderDataset, recipe: Recipe, seed: int, max_bad_fraction: float) -> None:
        self.dataset = dataset
        self.recipe = recipe
        self.seed = seed
        self.bad: dict[int, str] = {}
        self.refused: set[tuple[int, int]] = set()
        self._limit = max(1, int(max_bad_fraction * len(dataset.labels))) if max_bad_fraction > 0 else 0
        self._lock = threading.Lock()

    def fetch(self, epoch: int, sample: int) -> tuple[int, NDArray[np.uint8], tuple[int, int]]:
        """Sample actually used, its bytes and its (height, width).

        Raises:
            UserError: an unreadable validation image, or more unreadable training images than allowed.
        """
        candidate = sample
        for attempt in range(_MOST_SUBSTITUTES):
            try:
                if (epoch, candidate) in self.refused:
                    raise BadImage("is refused by the decoder")
                data = np.frombuffer(self._read(candidate), dtype=np.uint8)
                return candidate, data, image_size(data)
            except BadImage as error:
                self.mark_bad(candidate, str(error))
            candidate = int(
                below(len(self.dataset.labels), self.seed, Stream.SUBSTITUTE, epoch, sample, attempt)
            )
        raise UserError("data.root", self.dataset.root, "hardly any image can be read", "Check the files.")

    def refuse(self, epoch: int, sample: int, reason: str) -> None:
        """Replace an image that the decoder would not take, in this epoch only.

        Whether it refuses may depend on the crop window, which is the epoch's: a run that was restarted since must
        come to the same batches.
        """
        self.refused.add((epoch, sample))
        self.mark_bad(sample, f"is refused by the decoder ({reason})")

    def mark_bad(self, sample: int, reason: str) -> None:
        """Count an unreadable image once; raise when it may not be replaced."""
        path = self.dataset.path(sample)
        if not self.recipe.train:
            raise UserError(
                "data.val_root",
                path,
                f"validation image {reason}",
                "Restore or remove the file: counts are exact.",
            )
        with self._lock:
            if sample in self.bad:
                return
            self.bad[sample] = reason
            count = len(self.bad)
        log.warning("training image %s %s: replaced by another (%d so far)", path, reason, count)
        if count > self._limit:
            raise UserError(
                "data.max_bad_fraction",
                count,
                f"unreadable training images exceed the {self._limit} allowed, the latest {path} ({reason})",
                "Repair the data set, or raise data.max_bad_fraction.",
            )

    def _read(self, sample: int) -> bytes:
        try:
            data = self.dataset.read(sample)
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})") from None
        if not data:
            raise BadImage("is empty")
        return data


def image_size(data: NDArray[np.uint8]) -> tuple[int, int]:
    """(height, width) from the header of an encoded image.

    Raises:
        BadImage: not an image, a JPEG that ends before its end, or too many pixels.
    """
    jpeg = data[:2].tobytes() == b"\xff\xd8"
    size = _jpeg_size(data) if jpeg and _jpeg_complete(data) else None
    height, width = size or _size_by_pillow(data.tobytes(), full=jpeg)
    if height * width > _MOST_PIXELS:
        raise BadImage(f"cannot be decoded (claims {width} x {height} pixels)")
    return height, width


def _jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Walk the segments up to the frame header; None where the walk fails."""
    view = memoryview(data)  # pyright: ignore[reportArgumentType]
    at = 2
    while at + 9 < len(view):
        if view[at] != 0xFF:
            return None
        marker = view[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", view[at + 5 : at + 9])
            return (height, width) if height and width else None
        if marker == 0xFF:
            at += 1
            continue
        at += 2 + struct.unpack(">H", view[at + 2 : at + 4])[0]
    return None


def _jpeg_complete(data: NDArray[np.uint8]) -> bool:
    return b"\xff\xd9" in data[-64:].tobytes()


def _size_by_pillow(data: bytes, full: bool) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            if full:
                image.load()
            return image.height, image.width
    except UnidentifiedImageError:
        raise BadImage("is not an image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"cannot be decoded ({error})") from None


class EncodedStream:
    """Steps of encoded images from (epoch, step) to the epoch's end, read ahead by a pool of threads."""

    def __init__(
        self,
        reader: ImageReader,
        indices: Callable[[int, int], NDArray[np.int64]],
        steps_per_epoch: int,
        threads: int,
    ) -> None:
        self._reader = reader
        self._indices = indices
        self._steps = steps_per_epoch
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="dl2pa-read")

    def steps(self, epoch: int, step: int) -> Iterator[Encoded]:
        """Encoded steps `step`, `step` + 1, … of `epoch`."""
        ahead: deque[tuple[int, list[Future[tuple[int, NDArray[np.uint8], tuple[int, int]]]]]] = deque()
        upcoming = step
        while ahead or upcoming < self._steps:
            while upcoming < self._steps and len(ahead) < _AHEAD:
                samples = self._indices(epoch, upcoming).tolist()
                jobs = [self._pool.submit(self._reader.fetch, epoch, sample) for sample in samples]
                ahead.append((upcoming, jobs))
                upcoming += 1
            number, jobs = ahead.popleft()
            yield self._assemble(epoch, number, [job.result() for job in jobs])

    def _assemble(
        self, epoch: int, step: int, fetched: list[tuple[int, NDArray[np.uint8], tuple[int, int]]]
    ) -> Encoded:
        samples = np.array([sample for sample, _, _ in fetched], dtype=np.int64)
        sizes = np.array([size for _, _, size in fetched], dtype=np.int64).reshape(-1, 2)
        plan = draw_plan(self._reader.recipe, self._reader.seed, epoch, samples, sizes)
        return Encoded(epoch, step, [data for _, data, _ in fetched], plan, samples)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
