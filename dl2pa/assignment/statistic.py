"""Per-class feature sums in fixed point: exact, so they do not depend on order, world size or restarts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ONE = 2.0**32


class ClassStatistic(nn.Module):
    """Sum over samples of share * f/|f| for each class, and the sum of the shares (ALGORITHMS: statistic).

    Integer addition is exact: every order of the samples, split over ranks and restart gives identical bits. A share of
    1 is 2^32, so up to 2^31 samples fit between two updates.

    Buffers:
        sums, counts: int64 [C, d] and [C], of this rank's samples since the last reset.
        rows: float64 [C, d], unit rows of the last update; zero for a class without any sample.
    """

    sums: Tensor
    counts: Tensor
    rows: Tensor

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_classes, dim, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("rows", torch.zeros(num_classes, dim, dtype=torch.float64))

    @torch.no_grad()
    def add(self, features_bd: Tensor, targets_b: Tensor, share_b: Tensor | None = None) -> None:
        """Add samples, without a host sync; several samples of a class in a batch all count.

        Args:
            features_bd: [B, d], any norm.
            targets_b: int64 [B].
            share_b: weight of each sample for its target, in [0, 1]; default: 1.
        """
        unit = F.normalize(features_bd.float(), dim=1)
        if share_b is None:
            fixed_counts = torch.full_like(targets_b, int(_ONE))
        else:
            unit = unit * share_b[:, None]
            fixed_counts = (share_b * _ONE).round().long()
        self.sums.index_add_(0, targets_b, (unit * _ONE).round().long())
        self.counts.index_add_(0, targets_b, fixed_counts)

    @torch.no_grad()
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean unit feature of each class, float64 [C, d], zero without samples; and the sums of the shares [C]."""
        counts = self.counts.double() / _ONE
        means = self.sums.double() / _ONE / counts.clamp(min=1e-300)[:, None]
        return torch.where(counts[:, None] > 0, means, torch.zeros_like(means)), counts

    @torch.no_grad()
    def directions(self, momentum: float = 0.0) -> Tensor:
        """Unit rows [C, d] for the next update; a class without samples since the last update keeps its row."""
        means, counts = self.means()
        fresh = F.normalize(means, dim=1)
        blended = F.normalize(momentum * self.rows + (1.0 - momentum) * fresh, dim=1)
        return torch.where(counts[:, None] > 0, blended, self.rows)

    @torch.no_grad()
    def reset(self) -> None:
        """Reset sums and counts."""
        self.sums.zero_()
        self.counts.zero_()
