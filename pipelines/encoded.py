"""Read encoded images ahead of the decoder; replace or leave out unreadable ones; report stalled reads.

An image is unreadable if Pillow cannot decode it, whatever the loader: one that only DALI rejects is converted to PNG.
"""

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
from pipelines.header import image_size, is_cut_png
from pipelines.images import BadImage, check_bytes, convert_to_png, is_fault_of_process
from pipelines.readers import PendingReads, ReaderPool, StalledRead, describe_stall
from pipelines.rng import Stream, randint
from pipelines.transforms import CropParams, Draws, Transforms, draw_augmentation, draw_crop_params

log = logging.getLogger(__name__)

_PREFETCH_STEPS = 3
_JOBS_PER_THREAD = 4
_MAX_SUBSTITUTES = 100
_SLACK = 10
"""Unreadable images that one process may have before their rate is checked."""

_Job = Future["list[Fetched | None]"]
Fetched = tuple[int, NDArray[np.uint8], tuple[int, int]]
"""Number of the sample used, its bytes and its (height, width)."""


@dataclass(frozen=True)
class Encoded:
    """One rank's part of a step before decoding: encoded images and their crops.

    Attributes:
        missing: unreadable validation images of the step that were left out.
    """

    epoch: int
    step: int
    data: list[NDArray[np.uint8]]
    crop: CropParams
    samples: NDArray[np.int64]
    missing: int = 0
    draws: Draws | None = None


@dataclass(frozen=True)
class FaultLimits:
    """Limits on unreadable images and stalled reads.

    Attributes:
        max_bad_fraction: allowed fraction of unreadable training images; more stop the run.
        max_bad_val_fraction: allowed fraction of unreadable validation images, which are left out.
        read_warn_s: seconds after which, and interval at which, an unfinished read is logged.
        read_timeout_s: seconds after which an unfinished read ends the run.
        of_training: the images are training images, also if they are read as in validation: the limit is that of
            training.
    """

    max_bad_fraction: float = 0.01
    max_bad_val_fraction: float = 0.0
    read_warn_s: float = 30.0
    read_timeout_s: float = 300.0
    of_training: bool = False

    def allowed(self, num_samples: int, train: bool) -> int:
        """Allowed number of distinct unreadable images among `num_samples`."""
        if train or self.of_training:
            return max(1, int(self.max_bad_fraction * num_samples)) if self.max_bad_fraction > 0 else 0
        return int(self.max_bad_val_fraction * num_samples)


class ImageReader:
    """Reads encoded images and records the unreadable ones."""

    def __init__(self, dataset: ImageTable, transforms: Transforms, seed: int, limits: FaultLimits) -> None:
        self.dataset = dataset
        self.transforms = transforms
        self.seed = seed
        self.limits = limits
        self.bad: dict[int, str] = {}
        self.rejected: set[tuple[int, int]] = set()
        self.converted: set[tuple[int, int]] = set()
        self.pending = PendingReads()
        self.allowed = limits.allowed(len(dataset), transforms.train)
        self._num_requested = 0
        self._lock = threading.Lock()

    def fetch(self, epoch: int, sample: int) -> Fetched | None:
        """Read a sample; if it is unreadable, read a substitute (training) or return None (validation).

        Raises:
            UserError: more unreadable images than allowed.
        """
        candidate = sample
        with self._lock:
            self._num_requested += 1
        for attempt in range(_MAX_SUBSTITUTES):
            try:
                if (epoch, candidate) in self.rejected:
                    raise BadImage("is rejected by the decoder")
                data = self._read(candidate)
                size = image_size(data)
                data = self._for_decoder(data, (epoch, candidate) in self.converted)
                return candidate, np.frombuffer(data, dtype=np.uint8), size
            except BadImage as error:
                self.mark_bad(candidate, str(error))
            if not self.transforms.train:
                return None
            candidate = int(randint(len(self.dataset), self.seed, Stream.SUBSTITUTE, epoch, sample, attempt))
        problem = f"{_MAX_SUBSTITUTES} consecutive images could not be read"
        raise UserError("data.root", self.dataset.root, problem, "Check the files.")

    def convert(self, epoch: int, sample: int) -> bool:
        """Have Pillow decode an image that the decoder rejects, in this epoch only (see ``reject``).

        Returns:
            False if Pillow rejects it too, or the converted image was rejected.
        """
        if (epoch, sample) in self.converted:
            return False
        try:
            convert_to_png(self._read(sample))
        except BadImage:
            return False
        self.converted.add((epoch, sample))
        log.info("%s is rejected by the decoder: decoded by Pillow", self.dataset.path(sample))
        return True

    def reject(self, epoch: int, sample: int, reason: str) -> None:
        """Replace an image that the decoder rejects, in this epoch only.

        The decoder may reject only some crop windows, which differ per epoch. Limiting the replacement to the
        epoch gives a restarted run the same batches.
        """
        self.rejected.add((epoch, sample))
        self.mark_bad(sample, f"is rejected by the decoder ({reason})")

    def mark_bad(self, sample: int, reason: str) -> None:
        """Record an unreadable image once.

        Raises:
            UserError: more unreadable images than allowed.
        """
        path = self.dataset.path(sample)
        replaced = self.transforms.train
        train = replaced or self.limits.of_training
        if not train and self.limits.max_bad_val_fraction == 0:
            raise UserError(
                "data.val_root",
                str(path),
                f"validation image {reason}",
                "Restore or remove the file, or set data.max_bad_val_fraction to leave out a fraction of the images.",
            )
        with self._lock:
            if sample in self.bad:
                return
            self.bad[sample] = reason
            count = len(self.bad)
        kind, action = (
            "training" if train else "validation",
            "replaced by another image" if replaced else "left out",
        )
        log.warning("%s image %s %s: %s (%d so far)", kind, path, reason, action, count)
        if count > self.allowed:
            problem = f"exceed the {self.allowed} allowed"
        elif replaced and count > _SLACK + 2 * self.limits.max_bad_fraction * self._num_requested:
            # At this rate, the data set far exceeds the limit, but one of many processes would reach it late.
            problem = f"are too many of the {self._num_requested} read so far"
        else:
            return
        raise too_many(train, count, problem, f", the latest {path} ({reason})")

    def _for_decoder(self, data: bytes, rejected: bool) -> bytes:
        """The image in a form that the decoder reads; `rejected` if the decoder has rejected the file itself."""
        return convert_to_png(data) if rejected or is_cut_png(data) else data

    def _read(self, sample: int) -> bytes:
        expected = self.dataset.lengths.item(sample)
        check_bytes(expected)
        self.pending.begin(sample)
        try:
            data = self.dataset.read(sample)
        except (OSError, ValueError) as error:  # ValueError: not a valid file name
            if isinstance(error, UserError) and self.dataset.remote is not None:
                raise  # the shard, not this image, is wrong
            if is_fault_of_process(error):
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            raise BadImage(f"cannot be read ({reason})") from None
        finally:
            self.pending.end()
        if not data:
            raise BadImage("is empty")
        if len(data) != expected:
            raise BadImage(f"has changed (it has {len(data)} bytes and had {expected} when it was listed)")
        return data


def too_many(train: bool, count: int, problem: str, latest: str = "") -> UserError:
    """The error for more unreadable images than allowed."""
    field = "data.max_bad_fraction" if train else "data.max_bad_val_fraction"
    kind = "training" if train else "validation"
    message = f"unreadable {kind} images {problem}{latest}"
    return UserError(field, count, message, f"Repair the data set, or raise {field}.")


class EncodedStream:
    """Steps of encoded images, read ahead by a thread pool."""

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
        self._pool = ReaderPool(threads)

    def steps(self, epoch: int, step: int) -> Iterator[Encoded]:
        """Yield the encoded steps of `epoch` from `step` to the end."""
        ahead: deque[tuple[int, list[_Job]]] = deque()
        ready: deque[Encoded] = deque()
        upcoming = step
        while ready or ahead or upcoming < self._steps:
            while upcoming < self._steps and len(ahead) + len(ready) < _PREFETCH_STEPS:
                samples = self._indices(epoch, upcoming).tolist()
                self._reader.dataset.will_read(samples)
                # Several images per job keep the queue overhead small; a few jobs per thread balance the load.
                each = max(1, len(samples) // (_JOBS_PER_THREAD * self._threads))
                runs = [samples[i : i + each] for i in range(0, len(samples), each)]
                jobs = [self._pool.submit(partial(self._fetch, epoch, run)) for run in runs]
                ahead.append((upcoming, jobs))
                upcoming += 1
            if not ready:
                read = [self._collect(*ahead.popleft())]
                while ahead and all(job.done() for job in ahead[0][1]):
                    # An error is raised after the steps before it.
                    if any(job.cancelled() or job.exception() for job in ahead[0][1]):
                        break
                    read.append(self._collect(*ahead.popleft()))
                ready.extend(self._assemble(epoch, read))
            yield ready.popleft()

    def _fetch(self, epoch: int, samples: list[int]) -> list[Fetched | None]:
        return [self._reader.fetch(epoch, sample) for sample in samples]

    def _collect(self, step: int, jobs: list[_Job]) -> tuple[int, list[Fetched | None]]:
        """Number and images of a step, in the order of its samples."""
        return step, [one for job in jobs for one in self._wait(job)]

    def _wait(self, job: _Job) -> list[Fetched | None]:
        """Result of a job; log reads that take long.

        Raises:
            StalledRead: a read has exceeded the timeout.
        """
        limits = self._reader.limits
        pause = min(limits.read_warn_s, limits.read_timeout_s)
        while True:
            try:
                return job.result(pause)
            except TimeoutError:
                if job.done():
                    return job.result()
            if self._pool.has_lost_threads():
                raise RuntimeError("a thread that reads images has ended, probably for lack of memory")
            stalled = self._reader.pending.longer_than(pause)
            for sample, seconds in stalled:
                message = describe_stall(self._reader.dataset.path(sample), seconds)
                if seconds >= limits.read_timeout_s:
                    raise StalledRead(f"{message} (data.read_timeout_s = {limits.read_timeout_s:g})")
                log.warning(message)

    def _assemble(self, epoch: int, read: list[tuple[int, list[Fetched | None]]]) -> Iterator[Encoded]:
        """Yield steps whose random numbers are drawn together; for many steps this costs little more than for one."""
        fetched = [one for _, requested in read for one in requested if one is not None]
        samples = np.array([sample for sample, _, _ in fetched], dtype=np.int64)
        sizes = np.array([size for _, _, size in fetched], dtype=np.int64).reshape(-1, 2)
        transforms, seed = self._reader.transforms, self._reader.seed
        crop = draw_crop_params(transforms, seed, epoch, samples, sizes)
        draws = draw_augmentation(transforms, seed, epoch, samples)
        end = 0
        for step, requested in read:
            start, end = end, end + sum(one is not None for one in requested)
            part = slice(start, end)
            data = [data for _, data, _ in fetched[part]]
            missing = len(requested) - len(data)
            yield Encoded(epoch, step, data, crop.take(part), samples[part], missing, draws.take(part))

    def close(self) -> None:
        self._pool.close()
