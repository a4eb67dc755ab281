"""What a set of prototypes is worth: its largest cosine, and the best value any set could have."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dl2pa.geometry.bounds import max_cosine_bound

BLOCK_ELEMENTS = 1 << 22
"""Cosines held at once; rows are taken in blocks of this many, so that no C×C matrix exists for large C."""
_BLOCK = 65_536
_ALL_UP_TO = 32_768
_FEWEST_CHECKED, _PAIRS_CHECKED = 1024, 1 << 30


@dataclass(frozen=True)
class Certificate:
    """The measured quality of C unit vectors in R^d.

    Attributes:
        num_classes: C.
        dim: d.
        max_cosine: largest cosine between two different prototypes.
        mean_nearest_cosine: mean over prototypes of the cosine to their nearest other one.
        checked: prototypes whose nearest other one was looked for, drawn by chance; with fewer than C the largest
            cosine of all can be above max_cosine.
        mean_norm: length of the mean prototype; 0 when they balance, near 1 when they crowd on one side.
        lower_bound: no C unit vectors in R^d have a smaller max_cosine (see ``bounds``).
        construction: how they were made, or ``file``.
        seconds: what making them took.
    """

    num_classes: int
    dim: int
    max_cosine: float
    mean_nearest_cosine: float
    mean_norm: float
    lower_bound: float
    construction: str
    seconds: float
    checked: int

    def as_dict(self) -> dict[str, Any]:
        """The machine-readable form: what ``prototypes --json`` prints, less the file."""
        return asdict(self)


def certify(points: Tensor, construction: str, seconds: float) -> Certificate:
    """Measure ``points`` in float64, in blocks of rows; beyond 32,768 on a sample of the rows.

    Args:
        points: [C, d] with non-zero rows; lengths do not matter.
        construction: recorded in the certificate.
        seconds: recorded in the certificate.
    """
    num_classes, dim = points.shape
    sample = None
    if num_classes > _ALL_UP_TO:
        count = max(_FEWEST_CHECKED, _PAIRS_CHECKED // num_classes)
        sample = torch.randperm(num_classes, generator=torch.Generator().manual_seed(0))[:count]
    nearest = nearest_cosines(points) if sample is None else _nearest_of(points, sample)
    return Certificate(
        num_classes=num_classes,
        dim=dim,
        max_cosine=_plain(nearest.max()),
        mean_nearest_cosine=_plain(nearest.mean()),
        mean_norm=mean_norm(points),
        lower_bound=max_cosine_bound(num_classes, dim),
        construction=construction,
        seconds=seconds,
        checked=len(nearest),
    )


def mean_norm(points: Tensor) -> float:
    """Length of the mean of the rows' directions, in float64."""
    sums = torch.stack([_unit(part).sum(dim=0) for part in points.split(_BLOCK)])
    return float(torch.linalg.vector_norm(sums.sum(dim=0) / len(points)))


def nearest_cosines(points: Tensor) -> Tensor:
    """Cosine of each row to its nearest other row, float64 [C]; needs ``BLOCK_ELEMENTS`` cosines at once.

    Each pair is taken once: a block sees only the rows from its own first one on, and reports to both sides.
    """
    unit = _unit(points)
    count = unit.shape[0]
    nearest = torch.full((count,), -math.inf, dtype=torch.float64, device=unit.device)
    rows = max(1, min(count, BLOCK_ELEMENTS // count))
    for first in range(0, count, rows):
        cosines = unit[first : first + rows] @ unit[first:].T
        cosines.diagonal().fill_(-math.inf)
        stop = first + cosines.shape[0]
        nearest[first:stop] = torch.maximum(nearest[first:stop], cosines.amax(dim=1))
        nearest[first:] = torch.maximum(nearest[first:], cosines.amax(dim=0))
    return nearest


def _nearest_of(points: Tensor, sample: Tensor) -> Tensor:
    """Cosine of some rows to their nearest other row, float64 [S]; the others are taken in blocks."""
    rows = _unit(points[sample])
    nearest = torch.full((len(sample),), -math.inf, dtype=torch.float64)
    size = max(1, BLOCK_ELEMENTS // len(sample))
    for first in range(0, len(points), size):
        cosines = rows @ _unit(points[first : first + size]).T
        inside = (sample >= first) & (sample < first + size)
        cosines[inside.nonzero().flatten(), sample[inside] - first] = -math.inf
        nearest = torch.maximum(nearest, cosines.amax(dim=1))
    return nearest


def _unit(points: Tensor) -> Tensor:
    rows = points.detach().to(torch.float64)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _plain(value: Tensor) -> float:
    """A Python float within [-1, 1] that is never ``-0.0``."""
    return min(1.0, max(-1.0, float(value))) + 0.0
