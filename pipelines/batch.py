"""Batches and the interface of all pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dl2pa.step_parts import part
from pipelines.sampler import Sampler


@dataclass
class Batch:
    """One rank's part of a global batch of B images per rank, on the device.

    Attributes:
        images: float32 [B, 3, H, W], normalized, channels_last; of a feature data set float32 [B, D].
        targets: int64 [B].
        indices: int64 [B], sample numbers in the data set.
        valid: number of real samples; the rest, at the end, are padding (validation only).
        missing: unreadable images of this step that were left out (validation only).
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    valid: int
    missing: int = 0

    def split(self, size: int) -> list[Batch]:
        """Split into batches of at most `size` images; the first one keeps `missing`."""
        count = len(self.targets)
        if count <= size:
            return [self]
        return [
            Batch(
                self.images[start : start + size],
                self.targets[start : start + size],
                self.indices[start : start + size],
                min(max(self.valid - start, 0), size, count - start),
                0 if start else self.missing,
            )
            for start in range(0, count, size)
        ]


class Pipeline(Protocol):
    """Iterable over the batches of one epoch, from a given step on."""

    @property
    def num_samples(self) -> int:
        """Number of images in the data set, over all ranks."""
        ...

    @property
    def steps_per_epoch(self) -> int: ...

    def start(self, epoch: int, step: int = 0) -> None:
        """Set the epoch and step at which the next iteration begins."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def bad_images(self) -> list[str]:
        """Paths of the unreadable images that this rank has replaced or left out so far."""
        ...

    @property
    def max_bad_images(self) -> int:
        """Allowed number of distinct unreadable images, over all ranks."""
        ...

    def close(self) -> None:
        """Stop threads and free buffers."""
        ...


class SamplerPipeline:
    """Base class of the pipelines: step counts and position, no unreadable images."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._position = (0, 0)

    @property
    def num_samples(self) -> int:
        return self._sampler.num_samples

    @property
    def steps_per_epoch(self) -> int:
        return self._sampler.steps_per_epoch

    def start(self, epoch: int, step: int = 0) -> None:
        self._position = (epoch, step)

    def bad_images(self) -> list[str]:
        return []

    @property
    def max_bad_images(self) -> int:
        return 0

    def close(self) -> None:
        return None


def host_to_device(array_or_tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without synchronizing; on a GPU through pinned memory."""
    with part("dl2pa.to_device"):
        if device.type == "cuda":
            return array_or_tensor.pin_memory().to(device, non_blocking=True)
        return array_or_tensor.to(device)
