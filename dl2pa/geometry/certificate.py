"""Quality certificate of a set of prototypes: its largest cosine and the lower bound for any set of that size."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dl2pa.geometry.bounds import max_cosine_bound

BLOCK_ELEMENTS = 1 << 22
"""Maximum number of cosines in memory; larger matrices of cosines are computed in blocks of rows."""
_BLOCK = 65_536
_MAX_EXHAUSTIVE = 32_768
"""Maximum number of classes for which every prototype is checked; above, a random sample is checked."""
_MIN_CHECKED, _PAIRS_CHECKED = 1024, 1 << 30


@dataclass(frozen=True)
class Certificate:
    """Measured quality of C unit vectors in R^d.

    Attributes:
        num_classes: C.
        dim: d.
        max_cosine: largest cosine between a checked prototype and any other prototype.
        mean_nearest_cosine: mean over the checked prototypes of the cosine to the nearest other prototype.
        mean_norm: norm of the mean prototype; 0 for balanced prototypes, near 1 if they crowd on one side.
        lower_bound: lower bound on the largest cosine of any C unit vectors in R^d (see `bounds`).
        construction: name of the construction, or `file`.
        seconds: construction time.
        checked: number of prototypes compared with all others. If it is less than C, they are a random sample, and
            the largest cosine of all pairs can be above max_cosine.
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
        """JSON form, as printed by `dl2pa prototypes --json`."""
        return asdict(self)


def certify(points: Tensor, construction: str, seconds: float) -> Certificate:
    """Measure the rows of `points` in float64; above 32,768 rows, compare a random sample of them with all rows.

    Args:
        points: non-zero rows [C, d] of any norm.
        construction: recorded in the certificate.
        seconds: recorded in the certificate.
    """
    num_classes, dim = points.shape
    sample = None
    if num_classes > _MAX_EXHAUSTIVE:
        count = max(_MIN_CHECKED, _PAIRS_CHECKED // num_classes)
        sample = torch.randperm(num_classes, generator=torch.Generator().manual_seed(0))[:count]
    nearest = nearest_cosines(points) if sample is None else _nearest_cosines_of(points, sample)
    return Certificate(
        num_classes=num_classes,
        dim=dim,
        max_cosine=_to_cosine(nearest.max()),
        mean_nearest_cosine=_to_cosine(nearest.mean()),
        mean_norm=mean_norm(points),
        lower_bound=max_cosine_bound(num_classes, dim),
        construction=construction,
        seconds=seconds,
        checked=len(nearest),
    )


def mean_norm(points: Tensor) -> float:
    """Norm of the mean of the normalized rows, computed in float64."""
    sums = torch.stack([_unit(part).sum(dim=0) for part in points.split(_BLOCK)])
    return float(torch.linalg.vector_norm(sums.sum(dim=0) / len(points)))


def row_blocks(rows: int, columns: int) -> range:
    """First row of each block in which a rows × columns matrix is computed; the step is the block size."""
    return range(0, rows, max(1, min(rows, BLOCK_ELEMENTS // columns)))


def nearest_cosines(points: Tensor) -> Tensor:
    """Cosine of each row to its nearest other row, float64 [C].

    Each pair is computed once: a block is compared with its own rows and the rows after it.
    """
    unit = _unit(points)
    count = unit.shape[0]
    nearest = torch.full((count,), -math.inf, dtype=torch.float64, device=unit.device)
    blocks = row_blocks(count, count)
    for first in blocks:
        cosines = unit[first : first + blocks.step] @ unit[first:].T
        cosines.diagonal().fill_(-math.inf)
        stop = first + cosines.shape[0]
        nearest[first:stop] = torch.maximum(nearest[first:stop], cosines.amax(dim=1))
        nearest[first:] = torch.maximum(nearest[first:], cosines.amax(dim=0))
    return nearest


def _nearest_cosines_of(points: Tensor, sample: Tensor) -> Tensor:
    """Cosine of each sampled row to its nearest other row, float64 [S]."""
    rows = _unit(points[sample])
    nearest = torch.full((len(sample),), -math.inf, dtype=torch.float64)
    blocks = row_blocks(len(points), len(sample))
    for first in blocks:
        cosines = rows @ _unit(points[first : first + blocks.step]).T
        inside = (sample >= first) & (sample < first + blocks.step)
        cosines[inside.nonzero().flatten(), sample[inside] - first] = -math.inf
        nearest = torch.maximum(nearest, cosines.amax(dim=1))
    return nearest


def _unit(points: Tensor) -> Tensor:
    rows = points.detach().to(torch.float64)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _to_cosine(value: Tensor) -> float:
    """Convert to a Python float, clamped to [−1, 1] and never `-0.0`."""
    return min(1.0, max(-1.0, float(value))) + 0.0
