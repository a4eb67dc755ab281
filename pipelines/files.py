"""Batches from image files: read encoded images, decode, then augment and normalize on the device."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.ahead import AheadThread
from pipelines.batch import Batch, SamplerPipeline, host_to_device
from pipelines.encoded import Encoded, EncodedStream, ImageReader
from pipelines.images import BadImage
from pipelines.readers import StalledRead
from pipelines.sampler import Sampler
from pipelines.transforms import Transforms, finish

log = logging.getLogger(__name__)

_DECODING_ERRORS = (RuntimeError, BadImage)
_OF_THE_MACHINE = re.compile(
    r"out of memory|CUDA allocation|bad_alloc|CUDA (?:runtime|driver) API error|cudaError"
)
"""Decoding errors for which no image is to blame, also if they occur again with a single image."""


class Decoder(Protocol):
    """Turns encoded steps into images."""

    def decode(self, source: Iterator[Encoded]) -> Iterator[tuple[Encoded, Tensor]]: ...

    def in_flight(self) -> list[Encoded]: ...

    def close(self) -> None: ...


class ImageFilePipeline(SamplerPipeline):
    """A ``Pipeline`` over a table of encoded images."""

    def __init__(
        self,
        reader: ImageReader,
        transforms: Transforms,
        sampler: Sampler,
        decoder: Decoder,
        device: torch.device,
        threads: int,
    ) -> None:
        super().__init__(sampler)
        self._reader = reader
        self._transforms = transforms
        self._decoder = decoder
        self._device = device
        self._stream = EncodedStream(reader, sampler.indices, sampler.steps_per_epoch, threads)
        self._ahead = AheadThread("dl2pa-feed")

    def bad_images(self) -> list[str]:
        return [str(self._reader.dataset.path(sample)) for sample in sorted(self._reader.bad)]

    @property
    def max_bad_images(self) -> int:
        return self._reader.allowed

    def close(self) -> None:
        self._ahead.stop()
        self._stream.close()
        if self._ahead.close():
            self._decoder.close()

    def __iter__(self) -> Iterator[Batch]:
        epoch, step = self._position
        while step < self.steps_per_epoch:
            try:
                for batch in self._batches(epoch, step):
                    yield batch
                    step += 1
            except StalledRead:
                raise
            except _DECODING_ERRORS as error:
                if _OF_THE_MACHINE.search(str(error)):
                    raise
                self._reject_bad_images(error)

    def _batches(self, epoch: int, step: int) -> Iterator[Batch]:
        missing: dict[int, int] = {}
        expected = step

        def decoded() -> Iterator[tuple[Encoded, Tensor]]:
            return self._decoder.decode(self._nonempty_steps(epoch, step, missing))

        for encoded, images in self._ahead.iterate(decoded):
            for skipped in range(expected, encoded.step):
                yield self._padding(missing.get(skipped, 0))
            yield self._batch(encoded, images)
            expected = encoded.step + 1
        for skipped in range(expected, self.steps_per_epoch):
            yield self._padding(missing.get(skipped, 0))

    def _nonempty_steps(self, epoch: int, step: int, missing: dict[int, int]) -> Iterator[Encoded]:
        """Yield the steps that have images; record the missing counts of the others. DALI takes no empty batch."""
        for encoded in self._stream.steps(epoch, step):
            if len(encoded.samples):
                yield encoded
            else:
                missing[encoded.step] = encoded.missing

    def _reject_bad_images(self, error: Exception) -> None:
        """After a decoding error, convert or reject the images that caused it, and decode the step again."""
        reader = self._reader
        before = len(reader.rejected), len(reader.converted)
        for encoded in self._decoder.in_flight():
            for i, sample in enumerate(encoded.samples.tolist()):
                reason = self._decoding_error(_single_image(encoded, i))
                if reason is not None and not reader.convert(encoded.epoch, sample):
                    reader.reject(encoded.epoch, sample, reason)
        rejected, converted = len(reader.rejected) - before[0], len(reader.converted) - before[1]
        if not rejected and not converted:
            raise error
        log.info("decoding again with %d image(s) replaced and %d decoded by Pillow", rejected, converted)

    def _decoding_error(self, encoded: Encoded) -> str | None:
        """Error message of this decoder for a single image, or None; other decoders may accept the image."""
        try:
            for _ in self._decoder.decode(iter([encoded])):
                pass
        except _DECODING_ERRORS as error:
            if _OF_THE_MACHINE.search(str(error)):
                raise
            return str(error).rpartition("encountered:")[2].strip().partition("\n")[0]
        return None

    def _batch(self, encoded: Encoded, images: Tensor) -> Batch:
        valid, size = len(encoded.samples), self._sampler.local_batch
        samples = np.concatenate([encoded.samples, np.zeros(size - valid, dtype=np.int64)])
        if valid < size:
            images = torch.cat([images, images.new_zeros((size - valid, *images.shape[1:]))])
        images = host_to_device(images, self._device) if images.device != self._device else images
        labels = self._reader.dataset.labels[samples]
        draws = encoded.draws if valid == size else None
        return Batch(
            images=finish(self._transforms, images, self._reader.seed, encoded.epoch, samples, draws),
            targets=host_to_device(torch.from_numpy(labels), self._device),
            indices=host_to_device(torch.from_numpy(samples), self._device),
            valid=valid,
            missing=encoded.missing,
        )

    def _padding(self, missing: int) -> Batch:
        size, side = self._sampler.local_batch, self._transforms.image_size
        images = torch.zeros((size, 3, side, side), device=self._device)
        zeros = torch.zeros(size, dtype=torch.int64, device=self._device)
        return Batch(images.contiguous(memory_format=torch.channels_last), zeros, zeros.clone(), 0, missing)


def _single_image(encoded: Encoded, i: int) -> Encoded:
    """Image `i` of a step as a step of one image."""
    one = slice(i, i + 1)
    return Encoded(
        encoded.epoch, encoded.step, encoded.data[one], encoded.crop.take(one), encoded.samples[one]
    )
