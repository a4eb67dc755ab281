"""Reading encoded images ahead of the decoder: unreadable ones replaced or left out, hanging reads reported."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.table import ImageTable
from pipelines.header import image_size
from pipelines.images import BadImage, check_bytes
from pipelines.readers import ReadingPool, StalledRead, UnderWay, describe_stall
from pipelines.rng import Stream, randint
from pipelines.transforms import CropParams, Transforms, draw_crop_params

log = logging.getLogger(__name__)

_AHEAD = 3
_JOBS_A_THREAD = 4
_MOST_SUBSTITUTES = 100
_SLACK = 10

Fetched = tuple[int, NDArray[np.uint8], tuple[int, int]]
"""Sample actually used, its bytes and its (height, width)."""


@dataclass(frozen=True)
class Encoded:
    """One rank's share of a step before decoding: files as bytes, and what to do with them.

    Attributes:
        missing: unreadable validation images of the step that were left out.
    """

    epoch: int
    step: int
    data: list[NDArray[np.uint8]]
    crop: CropParams
    samples: NDArray[np.int64]
    missing: int = 0


@dataclass(frozen=True)
class FaultLimits:
    """When a damaged data set or a hanging file system is too much.

    Attributes:
        max_bad_fraction: share of unreadable training images beyond which the run stops.
        max_bad_val_fraction: share of unreadable validation images that may be left out of the count.
        read_warn_s: seconds after which a read that has not come back is reported, and again after as many.
        read_timeout_s: seconds after which it ends the run.
    """

    max_bad_fraction: float = 0.01
    max_bad_val_fraction: float = 0.0
    read_warn_s: float = 30.0
    read_timeout_s: float = 300.0

    def allowed(self, num_samples: int, train: bool) -> int:
        """Different unreadable images among `num_samples` that a run bears."""
        if train:
            return max(1, int(self.max_bad_fraction * num_samples)) if self.max_bad_fraction > 0 else 0
        return int(self.max_bad_val_fraction * num_samples)


class ImageReader:
    """Bytes and size of a sample's image; keeps account of the unreadable ones."""

    def __init__(self, dataset: ImageTable, transforms: Transforms, seed: int, limits: FaultLimits) -> None:
        self.dataset = dataset
        self.transforms = transforms
        self.seed = seed
        self.limits = limits
        self.bad: dict[int, str] = {}
        self.refused: set[tuple[int, int]] = set()
        self.under_way = UnderWay()
        self.allowed = limits.allowed(len(dataset), transforms.train)
        self._asked = 0
        self._lock = threading.Lock()

    def fetch(self, epoch: int, sample: int) -> Fetched | None:
        """The sample or, in training, what stands in for an unreadable one; None for one left out of validation.

        Raises:
            UserError: more unreadable images than allowed.
        """
        candidate = sample
        with self._lock:
            self._asked += 1
        for attempt in range(_MOST_SUBSTITUTES):
            try:
                if (epoch, candidate) in self.refused:
                    raise BadImage("is refused by the decoder")
                data = np.frombuffer(self._read(candidate), dtype=np.uint8)
                return candidate, data, image_size(data)
            except BadImage as error:
                self.mark_bad(candidate, str(error))
            if not self.transforms.train:
                return None
            candidate = int(randint(len(self.dataset), self.seed, Stream.SUBSTITUTE, epoch, sample, attempt))
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
        train = self.transforms.train
        if not train and self.limits.max_bad_val_fraction == 0:
            raise UserError(
                "data.val_root",
                str(path),
                f"validation image {reason}",
                "Restore or remove the file: counts are exact. data.max_bad_val_fraction allows some to be left out.",
            )
        with self._lock:
            if sample in self.bad:
                return
            self.bad[sample] = reason
            count = len(self.bad)
        kind, fate = ("training", "replaced by another") if train else ("validation", "left out")
        log.warning("%s image %s %s: %s (%d so far)", kind, path, reason, fate, count)
        if count > self.allowed:
            which = f"exceed the {self.allowed} allowed"
        elif train and count > _SLACK + 2 * self.limits.max_bad_fraction * self._asked:
            # At this rate the whole set is far beyond the limit, which one of many processes would take long to meet.
            which = f"are too many of the {self._asked} read so far"
        else:
            return
        raise too_many(train, count, which, f", the latest {path} ({reason})")

    def _read(self, sample: int) -> bytes:
        check_bytes(int(self.dataset.lengths[sample]))
        try:
            with self.under_way.read(sample):
                data = self.dataset.read(sample)
        except (OSError, ValueError) as error:  # ValueError: a name that can be no file's
            reason = error.strerror if isinstance(error, OSError) else error
            raise BadImage(f"cannot be read ({reason})") from None
        if not data:
            raise BadImage("is empty")
        expected = int(self.dataset.lengths[sample])
        if len(data) != expected:
            raise BadImage(f"has changed (of {len(data)} bytes; {expected} when it was listed)")
        return data


def too_many(train: bool, count: int, which: str, latest: str = "") -> UserError:
    """The error for more unreadable images than allowed."""
    field = "data.max_bad_fraction" if train else "data.max_bad_val_fraction"
    kind = "training" if train else "validation"
    message = f"unreadable {kind} images {which}{latest}"
    return UserError(field, count, message, f"Repair the data set, or raise {field}.")


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
        self._threads = threads
        self._pool = ReadingPool(threads)

    def steps(self, epoch: int, step: int) -> Iterator[Encoded]:
        """Encoded steps `step`, `step` + 1, … of `epoch`."""
        ahead: deque[tuple[int, list[Future[list[Fetched | None]]]]] = deque()
        upcoming = step
        while ahead or upcoming < self._steps:
            while upcoming < self._steps and len(ahead) < _AHEAD:
                samples = self._indices(epoch, upcoming).tolist()
                # A job of several images, so that handing jobs over costs little, yet a few for every thread.
                each = max(1, len(samples) // (_JOBS_A_THREAD * self._threads))
                runs = [samples[i : i + each] for i in range(0, len(samples), each)]
                jobs = [self._pool.submit(partial(self._fetch, epoch, run)) for run in runs]
                ahead.append((upcoming, jobs))
                upcoming += 1
            number, jobs = ahead.popleft()
            yield self._assemble(epoch, number, [one for job in jobs for one in self._wait(job)])

    def _fetch(self, epoch: int, samples: list[int]) -> list[Fetched | None]:
        return [self._reader.fetch(epoch, sample) for sample in samples]

    def _wait(self, job: Future[list[Fetched | None]]) -> list[Fetched | None]:
        """The job's result.

        Raises:
            StalledRead: a file has not been read within the time allowed.
        """
        limits = self._reader.limits
        pause = min(limits.read_warn_s, limits.read_timeout_s)
        while True:
            try:
                return job.result(pause)
            except TimeoutError:
                if job.done():
                    return job.result()
            stalled = self._reader.under_way.longer_than(pause)
            for sample, seconds in stalled:
                sentence = describe_stall(self._reader.dataset.path(sample), seconds)
                if seconds >= limits.read_timeout_s:
                    raise StalledRead(f"{sentence} (data.read_timeout_s = {limits.read_timeout_s:g})")
                log.warning(sentence)

    def _assemble(self, epoch: int, step: int, asked: list[Fetched | None]) -> Encoded:
        fetched = [one for one in asked if one is not None]
        samples = np.array([sample for sample, _, _ in fetched], dtype=np.int64)
        sizes = np.array([size for _, _, size in fetched], dtype=np.int64).reshape(-1, 2)
        crop = draw_crop_params(self._reader.transforms, self._reader.seed, epoch, samples, sizes)
        data = [data for _, data, _ in fetched]
        return Encoded(epoch, step, data, crop, samples, len(asked) - len(fetched))

    def close(self) -> None:
        self._pool.close()
