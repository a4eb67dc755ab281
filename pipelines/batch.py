"""What every pipeline yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function


@dataclass
class Batch:
    """One rank's part of a global batch, on the device.

    Attributes:
        images: float32 [B, 3, H, W], normalized, channels_last.
        targets: int64 [B].
        indices: int64 [B], the samples' places in the data set.
        valid: how many of the B are real; the others are padding at the end (validation only).
        missing: unreadable images of this step that were left out, where that is allowed (validation only).
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    valid: int
    missing: int = 0

    def split(self, size: int) -> list[Batch]:
        """Parts of at most so many images; `missing` counts in the first."""
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
    """Batches of one epoch, from a given step on."""

    @property
    def num_samples(self) -> int:
        """Images in the set, over all ranks."""
        ...

    @property
    def steps_per_epoch(self) -> int: ...

    def start(self, epoch: int, step: int = 0) -> None:
        """The next iteration begins at `step` of `epoch`."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def bad_images(self) -> list[str]:
        """Paths of unreadable images replaced or left out so far on this rank."""
        ...

    @property
    def max_bad_images(self) -> int:
        """Different unreadable images allowed, over all ranks."""
        ...

    def close(self) -> None:
        """End threads and free buffers."""
        ...


def host_to_device(array_or_tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting for the device: through pinned memory where there is a GPU."""
    with record_function("dl2pa.to_device"):
        if device.type == "cuda":
            return array_or_tensor.pin_memory().to(device, non_blocking=True)
        return array_or_tensor.to(device)
