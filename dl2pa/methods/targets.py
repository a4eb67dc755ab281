"""Labels of a batch, optionally mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """Labels `first` [B] int64 with weight `share` [B] float32, and `second` with 1 - share; not mixed if None.

    `first_counts` and `second_counts` are the number of labels of each class in the global batch, int64 [C]; None: the
    loss counts those of the batches that the processes pass to it.

    `negatives` are classes drawn for each sample, int64 [B, m]; None if the loss draws none.
    """

    first: Tensor
    second: Tensor | None = None
    share: Tensor | None = None
    first_counts: Tensor | None = None
    second_counts: Tensor | None = None
    negatives: Tensor | None = None

    def split(self, count: int) -> list[Targets]:
        """Split into `count` equal parts, in order."""

        def chunks(tensor: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * count if tensor is None else tensor.chunk(count)

        counts = self.first_counts, self.second_counts
        parts = zip(self.first.chunk(count), chunks(self.second), chunks(self.share), strict=True)
        negatives = chunks(self.negatives)
        return [Targets(*part, *counts, drawn) for part, drawn in zip(parts, negatives, strict=True)]

    def mean(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the batch mean of `loss(labels)` [B], weighted by the shares of both labels."""
        if self.share is None or self.second is None:
            return loss(self.first).mean()
        first, second = loss(self.first), loss(self.second)
        return (self.share * first + (1.0 - self.share) * second).mean()
