"""C points in R^d from direct sums and subsets of known codes.

In an orthogonal direct sum, points of different parts have cosine 0, so the largest cosine is that of the worst part,
or 0. Codes of fewer dimensions are padded with zeros. From larger codes a subset with a small sum is selected, so that
the prototypes do not crowd on one side of the sphere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dl2pa.geometry import simplex
from dl2pa.geometry.codes import Code, known_codes
from dl2pa.geometry.golay import Floats

_MAX_SELECTION_WORK = 4_000_000_000
"""Maximum number of multiplications to select a balanced subset; above, the subset is random."""


@dataclass(frozen=True)
class Combination:
    """Direct sum of codes with at least C points.

    Attributes:
        num_classes: C, the number of points to select.
        parts: codes in orthogonal subspaces.
        filler: number of further dimensions, filled with a cross-polytope (two points per dimension).
        cosine: largest cosine of the sum: that of the worst part, or 0.
    """

    num_classes: int
    parts: tuple[Code, ...]
    filler: int
    cosine: float

    @property
    def counts(self) -> list[int]:
        """Number of points selected from each part and from the filler, in proportion to their sizes."""
        sizes = [code.size for code in self.parts] + [2 * self.filler]
        total = sum(sizes)
        counts = [self.num_classes * size // total for size in sizes]
        remainders = [self.num_classes * size % total for size in sizes]
        order = sorted(range(len(sizes)), key=lambda part: -remainders[part])
        for part in order[: self.num_classes - sum(counts)]:
            counts[part] += 1
        return counts

    def __str__(self) -> str:
        names = [
            f"{code}" if count == code.size else f"{count} of {code}"
            for code, count in zip(self.parts, self.counts, strict=False)
        ]
        if self.filler:
            names.append(f"blocks ({self.counts[-1]}x{self.filler})")
        return " + ".join(names)


def best_combination(num_classes: int, dim: int) -> Combination | None:
    """Minimize the largest cosine over combinations of known codes with at least C points in R^d, C > 2d.

    Of equal combinations the one with the fewest dimensions is returned; None if no combination has C points.
    """
    usable = sorted((code for code in known_codes() if code.dim <= dim), key=lambda code: code.cosine)
    low, high = 0, len(usable)
    # The capacity grows with the number of codes: bisect for the shortest prefix with C points.
    while low < high:
        middle = (low + high) // 2
        if _capacity(usable[: middle + 1], dim)[0][-1] >= num_classes:
            high = middle
        else:
            low = middle + 1
    if low == len(usable):
        return None
    cosine = usable[low].cosine
    capacity, last = _capacity([code for code in usable if code.cosine <= cosine], dim)
    used = int(np.argmax(capacity >= num_classes))
    parts: list[Code] = []
    filler = 0
    while used:
        code = last[used]
        if code is None:
            filler += 1
            used -= 1
        else:
            parts.append(code)
            used -= code.dim
    parts.sort(key=lambda code: (-code.dim, code.name))
    return Combination(num_classes, tuple(parts), filler, max(0.0, *(code.cosine for code in parts)))


def _capacity(codes: list[Code], dim: int) -> tuple[NDArray[np.int64], list[Code | None]]:
    """Maximum number of points in 0, 1, …, d dimensions, and the code added last (None: one axis, two points)."""
    capacity = np.zeros(dim + 1, dtype=np.int64)
    last: list[Code | None] = [None] * (dim + 1)
    for used in range(1, dim + 1):
        capacity[used] = capacity[used - 1] + 2
        for code in codes:
            if code.dim <= used and capacity[used - code.dim] + code.size > capacity[used]:
                capacity[used] = capacity[used - code.dim] + code.size
                last[used] = code
    return capacity, last


def build_combination(combination: Combination, dim: int, seed: int) -> Tensor:
    """Build the points, float64 unit rows [C, d]; unused dimensions are zero.

    Args:
        combination: from `best_combination`.
        dim: d, at least the number of dimensions of all parts and the filler.
        seed: seed for random subsets, which only very large codes need.
    """
    points = np.zeros((combination.num_classes, dim))
    row = column = 0
    for code, count in zip(combination.parts, combination.counts, strict=False):
        part = spread_subset(code.build(), count, seed)
        points[row : row + count, column : column + code.dim] = part
        row, column = row + count, column + code.dim
    count, width = combination.counts[-1], combination.filler
    if count > 1:
        build = simplex.simplex if count <= width + 1 else simplex.blocks
        points[row:, column : column + width] = build(count, width).double().numpy()
    elif count:
        points[row, column] = 1.0
    return torch.from_numpy(points)


def spread_subset(points: Floats, count: int, seed: int) -> Floats:
    """Select `count` rows with a small sum, in the order of selection.

    Each step selects the row with the smallest inner product with the sum so far, the first of equal ones. If this
    takes too long, the rows are random; the norm of their mean is about 1/√count.
    """
    if count >= len(points):
        return points
    if len(points) * count * points.shape[1] > _MAX_SELECTION_WORK:
        return points[np.random.default_rng(seed).choice(len(points), count, replace=False)]
    scores = np.zeros(len(points))
    selected = np.zeros(count, dtype=np.int64)
    for step in range(count):
        selected[step] = np.argmin(scores)
        # Rounded so that equal scores stay equal.
        scores = np.round(scores + points @ points[selected[step]], 9)
        scores[selected[step]] = np.inf
    return points[selected]
