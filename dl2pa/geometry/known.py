"""C points in R^d from codes that are known: embedded, thinned out, and put side by side.

In an orthogonal direct sum points of different parts are at cosine 0, so its largest cosine is that of its worst
part (or 0). A code of fewer dimensions is padded with zeros; from a code of more points a subset is taken whose
sum is small, because prototypes on one side of the sphere would leave the other side unused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dl2pa.geometry import simplex
from dl2pa.geometry.codes import Code, known_codes

Floats = NDArray[np.float64]

_SELECTION_WORK = 4_000_000_000
"""Multiplications a careful choice of a subset may take; beyond, it is drawn by chance."""


@dataclass(frozen=True)
class Combination:
    """Parts in orthogonal subspaces that have room for C points together.

    Attributes:
        num_classes: C, the points to take.
        parts: codes, each in dimensions of its own.
        filler: dimensions after them that hold a cross-polytope, two points each.
        cosine: the largest cosine of the whole, max(parts, 0).
    """

    num_classes: int
    parts: tuple[Code, ...]
    filler: int
    cosine: float

    @property
    def dim(self) -> int:
        """Dimensions in use."""
        return sum(code.dim for code in self.parts) + self.filler

    @property
    def counts(self) -> list[int]:
        """Points taken of each part and of the filler: shares in proportion to the sizes."""
        sizes = [code.size for code in self.parts] + [2 * self.filler]
        whole = sum(sizes)
        shares = [self.num_classes * size // whole for size in sizes]
        remainders = [self.num_classes * size % whole for size in sizes]
        order = sorted(range(len(sizes)), key=lambda part: -remainders[part])
        for part in order[: self.num_classes - sum(shares)]:
            shares[part] += 1
        return shares

    def __str__(self) -> str:
        words = [
            f"{code}" if count == code.size else f"{count} of {code}"
            for code, count in zip(self.parts, self.counts, strict=False)
        ]
        if self.filler:
            words.append(f"blocks ({self.counts[-1]}x{self.filler})")
        return " + ".join(words)


def best_combination(num_classes: int, dim: int) -> Combination | None:
    """The combination of known codes with the smallest largest cosine for C points in R^d, C > 2d.

    Among equals, the one that needs the fewest dimensions. None if the codes have no room for C points.
    """
    usable = sorted((code for code in known_codes() if code.dim <= dim), key=lambda code: code.cosine)
    low, high = 0, len(usable)
    # Room only grows as worse codes are let in: bisect for the first prefix that has enough.
    while low < high:
        middle = (low + high) // 2
        if _room(usable[: middle + 1], dim)[0][-1] >= num_classes:
            high = middle
        else:
            low = middle + 1
    if low == len(usable):
        return None
    cosine = usable[low].cosine
    room, last = _room([code for code in usable if code.cosine <= cosine], dim)
    used = int(np.argmax(room >= num_classes))
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


def _room(codes: list[Code], dim: int) -> tuple[NDArray[np.int64], list[Code | None]]:
    """The most points in 0, 1, …, d dimensions, and the part that was added last (None: one axis, two points)."""
    room = np.zeros(dim + 1, dtype=np.int64)
    last: list[Code | None] = [None] * (dim + 1)
    for used in range(1, dim + 1):
        room[used] = room[used - 1] + 2
        for code in codes:
            if code.dim <= used and room[used - code.dim] + code.size > room[used]:
                room[used] = room[used - code.dim] + code.size
                last[used] = code
    return room, last


def build_combination(combination: Combination, dim: int, seed: int) -> Tensor:
    """The points, float64 [C, d] with unit rows; dimensions that are not needed are zero.

    Args:
        combination: from :func:`best_combination`.
        dim: d, at least ``combination.dim``.
        seed: of subsets that are drawn by chance, those of very large codes; others do not depend on it.
    """
    points = np.zeros((combination.num_classes, dim))
    row = column = 0
    for code, count in zip(combination.parts, combination.counts, strict=False):
        part = spread_subset(code.build(), count, seed)
        points[row : row + count, column : column + code.dim] = part
        row, column = row + count, column + code.dim
    count, width = combination.counts[-1], combination.filler
    if count > 1:
        make = simplex.simplex if count <= width + 1 else simplex.blocks
        points[row:, column : column + width] = make(count, width).double().numpy()
    elif count:
        points[row, column] = 1.0
    return torch.from_numpy(points)


def spread_subset(points: Floats, count: int, seed: int) -> Floats:
    """``count`` of the rows with a small sum, in the order they are chosen.

    One by one, that point is taken which is farthest from the sum so far; the first of equals. Where this takes
    too long, rows are drawn at random: their mean is about 1/√count long.
    """
    if count >= len(points):
        return points
    if len(points) * count * points.shape[1] > _SELECTION_WORK:
        return points[np.random.default_rng(seed).choice(len(points), count, replace=False)]
    scores = np.zeros(len(points))
    taken = np.zeros(count, dtype=np.int64)
    for place in range(count):
        taken[place] = np.argmin(scores)
        # Rounded, so that equals stay equal; a point that is taken is out of reach for ever.
        scores = np.round(scores + points @ points[taken[place]], 9)
        scores[taken[place]] = np.inf
    return points[taken]
