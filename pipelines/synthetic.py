"""Synthetic batches from a small pool of noise images, for benchmarks and trial runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pipelines.batch import Batch, SamplerPipeline, host_to_device
from pipelines.rng import Stream, random_bits, uniform
from pipelines.sampler import Sampler

_POOL = 32


class SyntheticPipeline(SamplerPipeline):
    """A ``Pipeline`` in which sample i has image i mod 32 of the pool and a pseudo-random label."""

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        sampler: Sampler,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(sampler)
        self._classes = num_classes
        self._size = image_size
        self._seed = seed
        self._device = device
        pixels = np.arange(_POOL * 3 * image_size * image_size)
        noise = 2 * uniform(seed, Stream.SYNTHETIC, pixels).astype(np.float32) - 1
        pool = torch.from_numpy(noise.reshape(_POOL, 3, image_size, image_size))
        self._pool = pool.to(device).contiguous(memory_format=torch.channels_last)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self._position
        for step in range(first, self.steps_per_epoch):
            samples = self._sampler.indices(epoch, step)
            valid = len(samples)
            samples = np.concatenate([samples, np.zeros(self._sampler.local_batch - valid, np.int64)])
            labels = random_bits(self._seed, Stream.SYNTHETIC, samples) % np.uint64(self._classes)
            index = host_to_device(torch.from_numpy(samples), self._device)
            targets = host_to_device(torch.from_numpy(labels.astype(np.int64)), self._device)
            yield Batch(self._pool[index % _POOL], targets, index, valid)
