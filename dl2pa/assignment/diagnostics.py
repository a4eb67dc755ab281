"""What a matching tells about the classes: how sure it is, how tight and how far apart the classes lie."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dl2pa.assignment.bipartite import Floats
from dl2pa.assignment.margin import MOST_CLASSES, second_best_margin

_MOST_CLASSES = 4096
"""Classes up to which the closest pair is looked for."""


@dataclass(frozen=True)
class MatchDiagnostics:
    """Measured on the features since the last matching; None where it cannot be told or would take too long.

    Attributes:
        margin: objective of the new assignment less that of the second best one; 0 where another is as good.
        compactness: mean over the classes seen of the mean cosine of a class's features to their mean direction, which
            is the length of their mean unit feature.
        loosest_class: the label where that is smallest.
        mean_cosine: between the mean directions of two classes, over all pairs.
        largest_cosine, closest_classes: of the two classes closest to each other, and their labels.
        seconds: what it took.
    """

    margin: float | None
    compactness: float | None
    loosest_class: int | None
    mean_cosine: float | None
    largest_cosine: float | None
    closest_classes: tuple[int, int] | None
    seconds: float

    def metrics(self) -> dict[str, float]:
        """The numbers that are curves over a run."""
        named = {
            "margin": self.margin,
            "compactness": self.compactness,
            "mean_class_cosine": self.mean_cosine,
            "largest_class_cosine": self.largest_cosine,
        }
        return {name: value for name, value in named.items() if value is not None}


def compute_diagnostics(means_cd: Floats, seen_c: Floats) -> MatchDiagnostics:
    """What the features alone tell; the margin is left open.

    Args:
        means_cd: mean unit feature of each class [C, d].
        seen_c: weight of the samples of each class [C]; 0: none seen.
    """
    began = time.perf_counter()
    lengths = np.linalg.norm(means_cd, axis=1)
    labels = np.flatnonzero((seen_c > 0) & (lengths > 0))
    compactness = loosest = mean = largest = closest = None
    if len(labels):
        compactness = float(lengths[labels].mean())
        loosest = int(labels[lengths[labels].argmin()])
    if len(labels) > 1:
        directions = means_cd[labels] / lengths[labels, None]
        count = len(labels)
        mean = float((np.square(directions.sum(axis=0)).sum() - count) / (count * (count - 1)))
        if count <= _MOST_CLASSES:
            largest, (one, other) = _closest(directions)
            closest = int(labels[one]), int(labels[other])
    seconds = time.perf_counter() - began
    return MatchDiagnostics(None, compactness, loosest, mean, largest, closest, seconds)


def with_margin(
    diagnostics: MatchDiagnostics, rows_cd: Floats, prototypes_cd: Floats, assignment_c: NDArray[np.int64]
) -> MatchDiagnostics:
    """Add the margin of an assignment update, up to `MOST_CLASSES`.

    Args:
        rows_cd, prototypes_cd: Q and P [C, d].
        assignment_c: the optimal σ, int64 [C].
    """
    if len(assignment_c) > MOST_CLASSES:
        return diagnostics
    began = time.perf_counter()
    cost = (rows_cd.mean(axis=0) - rows_cd) @ (prototypes_cd - prototypes_cd.mean(axis=0)).T
    margin = second_best_margin(cost, assignment_c)
    return replace(diagnostics, margin=margin, seconds=diagnostics.seconds + time.perf_counter() - began)


def _closest(directions_cd: Floats) -> tuple[float, tuple[int, int]]:
    """The largest cosine between two rows, and which."""
    single = directions_cd.astype(np.float32)
    cosines = single @ single.T
    np.fill_diagonal(cosines, -np.inf)
    one, other = sorted(int(i) for i in divmod(int(cosines.argmax()), len(single)))
    return float(directions_cd[one] @ directions_cd[other]), (one, other)
