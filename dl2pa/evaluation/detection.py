"""Separation of two sets of scores: AUROC and false-positive rate, with exact treatment of ties."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

TPR_PERCENT = 95
"""Percentage of in-distribution images that the threshold of `fpr95` accepts."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Detection:
    """How well a score separates in-distribution images (high) from others (low), in percent.

    Attributes:
        auroc: probability that a random in-distribution image has a higher score than a random other one, where a tie
            counts one half; the area under the ROC curve.
        fpr95: share of the other images with a score of at least the threshold that accepts 95 % of the
            in-distribution images.
    """

    auroc: float
    fpr95: float

    def metrics(self) -> dict[str, float]:
        return asdict(self)


def detect(inside_n: Scores, outside_m: Scores) -> Detection:
    """Compare the scores [N] of in-distribution images with the scores [M] of other images; N, M at least 1."""
    return Detection(auroc(inside_n, outside_m), fpr_at_tpr(inside_n, outside_m, TPR_PERCENT))


def auroc(inside_n: Scores, outside_m: Scores) -> float:
    """Area under the ROC curve in percent: the Mann-Whitney statistic, from integer counts of wins and ties."""
    ordered = np.sort(outside_m)
    below = int(np.searchsorted(ordered, inside_n, side="left").sum())
    up_to = int(np.searchsorted(ordered, inside_n, side="right").sum())
    return 100.0 * (below + up_to) / (2 * len(inside_n) * len(outside_m))


def fpr_at_tpr(inside_n: Scores, outside_m: Scores, percent: int) -> float:
    """False-positive rate in percent at the highest threshold that accepts `percent` % of the in-distribution images.

    A score equal to the threshold is accepted.
    """
    needed = -(-percent * len(inside_n) // 100)
    threshold = np.sort(inside_n)[len(inside_n) - needed]
    return 100.0 * int((outside_m >= threshold).sum()) / len(outside_m)
