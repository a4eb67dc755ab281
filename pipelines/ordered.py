"""What every pipeline over an order has in common."""

from __future__ import annotations

from pipelines.order import Order


class OrderedPipeline:
    """Counts and position of a ``Pipeline``; its subclasses make the batches."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._position = (0, 0)

    @property
    def num_samples(self) -> int:
        return self._order.num_samples

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    def start(self, epoch: int, step: int = 0) -> None:
        self._position = (epoch, step)

    def problems(self) -> list[str]:
        return []

    @property
    def most_bad(self) -> int:
        return 0

    def close(self) -> None:
        return None
