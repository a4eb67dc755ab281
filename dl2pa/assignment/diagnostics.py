"""Diagnostics of an assignment update: margin, compactness of the classes and cosines between them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dl2pa.assignment.bipartite import Floats
from dl2pa.assignment.margin import MAX_CLASSES, second_best_margin
from dl2pa.assignment.quadratic import alignment, similarity_factor

_MAX_CLASSES_IN_PAIRS = 4096
"""Maximum number of classes for which the closest pair is searched."""


@dataclass(frozen=True)
class MatchDiagnostics:
    """Diagnostics of the features since the last update; None where undefined or too expensive.

    Attributes:
        margin: objective of the new assignment minus that of the second best; 0 if the optimum is not unique.
        compactness: mean over observed classes of the mean cosine between features and their mean direction, which
            equals the norm of the mean unit feature.
        loosest_class: label with the smallest such value.
        mean_cosine: mean cosine between the mean directions of two classes, over all pairs.
        largest_cosine, closest_classes: largest such cosine, and the labels of its two classes.
        seconds: computation time.
        alignment: agreement of the similarities of classes and of their prototypes (`quadratic.alignment`).
    """

    margin: float | None
    compactness: float | None
    loosest_class: int | None
    mean_cosine: float | None
    largest_cosine: float | None
    closest_classes: tuple[int, int] | None
    seconds: float
    alignment: float | None = None

    def metrics(self) -> dict[str, float]:
        """Values that are logged as curves."""
        named = {
            "margin": self.margin,
            "compactness": self.compactness,
            "mean_class_cosine": self.mean_cosine,
            "largest_class_cosine": self.largest_cosine,
            "alignment": self.alignment,
        }
        return {name: value for name, value in named.items() if value is not None}


def compute_diagnostics(means_cd: Floats, seen_c: Floats) -> MatchDiagnostics:
    """Compute all diagnostics but the margin.

    Args:
        means_cd: mean unit feature of each class [C, d].
        seen_c: total weight of the samples of each class [C]; 0 for a class without samples.
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
        if count <= _MAX_CLASSES_IN_PAIRS:
            largest, (one, other) = _closest(directions)
            closest = int(labels[one]), int(labels[other])
    seconds = time.perf_counter() - began
    return MatchDiagnostics(None, compactness, loosest, mean, largest, closest, seconds)


def with_margin(
    diagnostics: MatchDiagnostics, rows_cd: Floats, prototypes_cd: Floats, assignment_c: NDArray[np.int64]
) -> MatchDiagnostics:
    """Add the margin, for up to `MAX_CLASSES` classes.

    Args:
        rows_cd, prototypes_cd: Q and P [C, d].
        assignment_c: the optimal σ, int64 [C].
    """
    if len(assignment_c) > MAX_CLASSES:
        return diagnostics
    began = time.perf_counter()
    cost = (rows_cd.mean(axis=0) - rows_cd) @ (prototypes_cd - prototypes_cd.mean(axis=0)).T
    margin = second_best_margin(cost, assignment_c)
    return replace(diagnostics, margin=margin, seconds=diagnostics.seconds + time.perf_counter() - began)


def with_alignment(
    diagnostics: MatchDiagnostics, rows_ck: Floats, prototypes_cd: Floats, assignment_c: NDArray[np.int64]
) -> MatchDiagnostics:
    """Add the alignment, for up to 4,096 classes.

    Args:
        rows_ck: direction of each class; zero for a class without samples.
        prototypes_cd: P [C, d].
        assignment_c: the new σ, int64 [C].
    """
    if len(assignment_c) > _MAX_CLASSES_IN_PAIRS:
        return diagnostics
    began = time.perf_counter()
    factor = similarity_factor(rows_ck)
    value = alignment(factor, prototypes_cd, assignment_c) if factor.any() else None
    return replace(diagnostics, alignment=value, seconds=diagnostics.seconds + time.perf_counter() - began)


def _closest(directions_cd: Floats) -> tuple[float, tuple[int, int]]:
    """Largest cosine between two rows, and the indices of these rows in ascending order."""
    single = directions_cd.astype(np.float32)
    cosines = single @ single.T
    np.fill_diagonal(cosines, -np.inf)
    one, other = sorted(int(i) for i in divmod(int(cosines.argmax()), len(single)))
    return float(directions_cd[one] @ directions_cd[other]), (one, other)
