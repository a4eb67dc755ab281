"""Data sets kept in device memory: a batch is one gather, with crop and flip in the indices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch, SamplerPipeline, host_to_device
from pipelines.datasets.arrays import ArrayDataset
from pipelines.rng import Stream, randint
from pipelines.sampler import Sampler
from pipelines.transforms import Draws, Transforms, draw_augmentation, draw_flips, finish

_DRAWN_STEPS = 32


class ResidentPipeline(SamplerPipeline):
    """A ``Pipeline`` over uint8 arrays on the device, zero-padded for the random crop."""

    def __init__(
        self,
        dataset: ArrayDataset,
        transforms: Transforms,
        sampler: Sampler,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(sampler)
        self._transforms = transforms
        self._seed = seed
        self._device = device
        self._pad = transforms.pad if transforms.train and transforms.crop == "pad" else 0
        border = ((0, 0), (self._pad, self._pad), (self._pad, self._pad), (0, 0))
        images = np.pad(dataset.images, border) if self._pad else dataset.images
        self._images = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        self._labels = torch.from_numpy(dataset.labels).to(device)
        self._side = dataset.images.shape[1]
        self._span = torch.arange(self._side, device=device)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self._position
        steps = range(first, self.steps_per_epoch)
        samples = [self._sampler.indices(epoch, step) for step in steps]
        if not samples:
            return
        # One copy of the crop parameters per epoch, so that the step loop never waits for the host.
        all_samples = np.concatenate(samples)
        params = host_to_device(torch.from_numpy(self._crop_params(epoch, all_samples)), self._device)
        offset = 0
        for part, draws in zip(samples, self._draws(epoch, samples), strict=True):
            yield self._batch(epoch, part, params[:, offset : offset + len(part)], draws)
            offset += len(part)

    def _draws(self, epoch: int, samples: list[NDArray[np.int64]]) -> Iterator[Draws]:
        """Yield the augmentation of each step, drawn for many steps together."""
        for first in range(0, len(samples), _DRAWN_STEPS):
            block = samples[first : first + _DRAWN_STEPS]
            draws = draw_augmentation(self._transforms, self._seed, epoch, np.concatenate(block))
            end = 0
            for part in block:
                start, end = end, end + len(part)
                yield draws.take(slice(start, end))

    def _crop_params(self, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """[4, n] rows: sample, top, left, flip."""
        zeros = np.zeros_like(samples)
        if not self._transforms.train:
            return np.stack([samples, zeros, zeros, zeros])
        top, left = zeros, zeros
        if self._pad:
            top = randint(2 * self._pad + 1, self._seed, Stream.CROP, epoch, samples, 0)
            left = randint(2 * self._pad + 1, self._seed, Stream.CROP, epoch, samples, 1)
        flip = draw_flips(self._transforms, self._seed, epoch, samples).astype(np.int64)
        return np.stack([samples, top, left, flip])

    def _batch(self, epoch: int, samples: NDArray[np.int64], params_4b: Tensor, draws: Draws | None) -> Batch:
        valid, size = len(samples), self._sampler.local_batch
        if valid < size:
            params_4b = torch.cat([params_4b, params_4b.new_zeros((4, size - valid))], dim=1)
            samples, draws = np.concatenate([samples, np.zeros(size - valid, dtype=np.int64)]), None
        index, top, left, flip = params_4b
        rows = top[:, None] + self._span
        columns = left[:, None] + torch.where(flip[:, None] > 0, self._side - 1 - self._span, self._span)
        images = self._images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return Batch(
            images=finish(self._transforms, images, self._seed, epoch, samples, draws),
            targets=self._labels[index],
            indices=index,
            valid=valid,
        )
