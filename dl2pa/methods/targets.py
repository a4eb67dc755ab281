"""Labels of a batch, possibly mixed from two."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """`first` [B] int64 with weight `share` [B] float32, `second` with the rest; plain labels where those are None."""

    first: Tensor
    second: Tensor | None = None
    share: Tensor | None = None

    def mean(self, loss_first_b: Tensor, loss_second_b: Tensor | None) -> Tensor:
        """Mean over the batch of the two losses [B], each weighted by its labels' share."""
        if self.share is None or loss_second_b is None:
            return loss_first_b.mean()
        return (self.share * loss_first_b + (1.0 - self.share) * loss_second_b).mean()
