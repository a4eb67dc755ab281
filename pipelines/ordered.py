"""What every pipeline over an order has in common."""

from __future__ import annotations

from pipelines.sampler import Sampler


class OrderedPipeline:
    """Counts and position of a ``Pipeline``; its subclasses make the batches."""

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
