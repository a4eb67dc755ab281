"""Feature vectors kept in device memory: a batch is one gather, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pipelines.batch import Batch, SamplerPipeline, host_to_device
from pipelines.datasets.features import FeatureDataset
from pipelines.sampler import Sampler


class FeaturePipeline(SamplerPipeline):
    """A ``Pipeline`` over feature vectors; `images` of its batches are float32 [B, D]."""

    def __init__(self, dataset: FeatureDataset, sampler: Sampler, device: torch.device) -> None:
        super().__init__(sampler)
        self._device = device
        self._features = torch.from_numpy(dataset.features).to(device)
        self._labels = torch.from_numpy(dataset.labels).to(device)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self._position
        parts = [self._sampler.indices(epoch, step) for step in range(first, self.steps_per_epoch)]
        if not parts:
            return
        size = self._sampler.local_batch
        padded = [np.concatenate([part, np.zeros(size - len(part), np.int64)]) for part in parts]
        # One copy per epoch, so that the step loop never waits for the host.
        indices = host_to_device(torch.from_numpy(np.stack(padded)), self._device)
        for part, index in zip(parts, indices, strict=True):
            features = self._features.index_select(0, index).float()
            yield Batch(features, self._labels.index_select(0, index), index, len(part))
