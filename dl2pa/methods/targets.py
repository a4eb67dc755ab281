"""Labels of a batch, optionally mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """Labels `first` [B] int64 with weight `share` [B] float32, and `second` with 1 - share; not mixed if None."""

    first: Tensor
    second: Tensor | None = None
    share: Tensor | None = None

    def mean(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the batch mean of `loss(labels)` [B], weighted by the shares of both labels."""
        if self.share is None or self.second is None:
            return loss(self.first).mean()
        first, second = loss(self.first), loss(self.second)
        return (self.share * first + (1.0 - self.share) * second).mean()
