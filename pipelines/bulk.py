"""Batches of many image files for prediction, prepared as in evaluation; unreadable files are left out.

With the loader `dali`, images that Pillow decodes to other colors than DALI, and all formats other than JPEG and PNG,
are decoded by Pillow and only resized by DALI.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.datasets.table import ImageTable
from pipelines.encoded import FaultLimits, ImageReader
from pipelines.files import Decoder, ImageFilePipeline
from pipelines.header import has_common_format, image_size
from pipelines.images import BadImage, convert_to_bmp, convert_to_png
from pipelines.sampler import SubsetSampler
from pipelines.single import evaluation_transforms
from pipelines.transforms import Transforms

LOADERS = ("dali", "torchvision")
_MAX_UNCOMPRESSED = 1 << 20
"""Largest number of pixels of an image that is passed on without compression."""


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Readable images of a step.

    Attributes:
        images: float32 [n, 3, S, S], normalized, channels_last, on the device; n may be 0.
        samples: int64 [n], positions in the table, ascending.
        failures: positions of the unreadable images of the step, with the reasons.
    """

    images: Tensor
    samples: NDArray[np.int64]
    failures: dict[int, str]


@dataclass(frozen=True)
class BulkOptions:
    """Reading of many images.

    Attributes:
        batch: images per step; an unreadable image makes its step smaller and does not change the others.
        threads: threads that read, and threads that decode.
        loader: of ``LOADERS``; `torchvision` decodes with Pillow.
    """

    batch: int
    threads: int
    loader: str = "torchvision"


class _Reader(ImageReader):
    """Reader that records every unreadable image, without limit and log."""

    def mark_bad(self, sample: int, reason: str) -> None:
        self.bad.setdefault(sample, reason)

    def reject(self, epoch: int, sample: int, reason: str) -> None:
        self.mark_bad(sample, reason)
        super().reject(epoch, sample, reason)


class _DaliReader(_Reader):
    """Reader for DALI; the reasons of unreadable images are Pillow's."""

    def reject(self, epoch: int, sample: int, reason: str) -> None:
        try:
            convert_to_bmp(self._read(sample))
        except BadImage as error:
            reason = str(error)
        super().reject(epoch, sample, reason)

    def _for_decoder(self, data: bytes, rejected: bool) -> bytes:
        if has_common_format(data) and not rejected:
            return data
        height, width = image_size(data)
        # Uncompressed images of all steps that are read ahead would need too much memory.
        return convert_to_bmp(data) if height * width <= _MAX_UNCOMPRESSED else convert_to_png(data)


@contextmanager
def open_batches(
    table: ImageTable,
    preprocessing: Mapping[str, Any],
    options: BulkOptions,
    device: torch.device,
    samples: Sequence[int] | None = None,
) -> Generator[Generator[ImageBatch]]:
    """Yield an iterator over the steps of a table, or of `samples` of it, in order; closes its threads at the end.

    Args:
        preprocessing: of the description of a model.
    """
    transforms = evaluation_transforms(**preprocessing)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    reader_type = _DaliReader if options.loader == "dali" else _Reader
    reader = reader_type(table, transforms, 0, FaultLimits())
    decoder = _decoder(transforms, options, device)
    sampler = SubsetSampler(tuple(range(len(table)) if samples is None else samples), options.batch)
    with _quiet("pipelines.files"):
        pipeline = ImageFilePipeline(reader, transforms, sampler, decoder, device, options.threads)
        try:
            yield _batches(pipeline, reader, sampler)
        finally:
            pipeline.close()


def _decoder(transforms: Transforms, options: BulkOptions, device: torch.device) -> Decoder:
    if options.loader == "dali":
        from pipelines.decode_dali import DaliDecoder

        return DaliDecoder(transforms, options.batch, options.threads, device)
    from pipelines.decode_pillow import PillowDecoder

    return PillowDecoder(transforms.image_size, options.threads, transforms.interpolation)


def _batches(pipeline: ImageFilePipeline, reader: _Reader, sampler: SubsetSampler) -> Generator[ImageBatch]:
    pipeline.start(0)
    for step, batch in enumerate(pipeline):
        all_samples = sampler.indices(0, step)
        samples = batch.indices[: batch.valid].cpu().numpy()
        missing = np.setdiff1d(all_samples, samples).tolist()
        yield ImageBatch(batch.images[: batch.valid], samples, {i: reader.bad[i] for i in missing})


@contextmanager
def _quiet(name: str) -> Generator[None]:
    """Context in which a logger writes no information: every unreadable image is reported at the end."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
