"""Confusion matrix, per-class metrics and calibration from the predictions of a validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # imports torch
    from dl2pa.training.evaluate import Predictions

Labels = NDArray[np.int64]
_MAX_SORTED = 2000
"""Maximum number of classes for a [C, C] matrix of distances."""


@dataclass(frozen=True)
class Confusion:
    """Nonzero entries of the confusion matrix, ordered by true and then by predicted class.

    Attributes:
        true, predicted: classes, int64 [M].
        count: images, int64 [M].
        totals: images per true class, int64 [C].
    """

    true: Labels
    predicted: Labels
    count: Labels
    totals: Labels

    @property
    def num_classes(self) -> int:
        return len(self.totals)

    def share(self) -> NDArray[np.float64]:
        """Share of the images of the true class per entry, [M]."""
        return self.count / np.maximum(1, self.totals[self.true])


def confuse(targets_n: Labels, predicted_n: Labels, num_classes: int) -> Confusion:
    """Count pairs of true and predicted classes; memory is O(N), not O(C²)."""
    keys, count = np.unique(targets_n * num_classes + predicted_n, return_counts=True)
    totals = np.bincount(targets_n, minlength=num_classes)
    return Confusion(keys // num_classes, keys % num_classes, count.astype(np.int64), totals)


@dataclass(frozen=True)
class Pair:
    """Confusion of two classes.

    Attributes:
        count: images of class `true` predicted as class `predicted`.
        share: share of the images of the true class.
        back: images confused the other way around.
    """

    true: int
    predicted: int
    count: int
    share: float
    back: int


def worst_pairs(confusion: Confusion, limit: int) -> list[Pair]:
    """Return the most frequent confusions, ordered by count, share and label."""
    off = confusion.true != confusion.predicted
    true, predicted = confusion.true[off], confusion.predicted[off]
    count, share = confusion.count[off], confusion.share()[off]
    order = np.lexsort((predicted, true, -share, -count))[:limit]
    back = {(t, p): n for t, p, n in zip(true.tolist(), predicted.tolist(), count.tolist(), strict=True)}
    columns = (array[order].tolist() for array in (true, predicted, count, share))
    return [Pair(t, p, n, s, back.get((p, t), 0)) for t, p, n, s in zip(*columns, strict=True)]


@dataclass(frozen=True)
class ClassRow:
    """Validation results of one class; percentages, None if the denominator is 0.

    Attributes:
        trained: training images, if known.
        top1, top5: recall.
        precision: share of the predictions of the class that are correct.
        confidence, confidence_calibrated: mean confidence of the predictions for its images, before and after
            calibration.
        taken_for: most frequent wrong prediction.
        taken_for_count: images with that prediction.
    """

    label: int
    name: str
    group: str | None
    trained: int | None
    images: int
    top1: float | None
    top5: float | None
    precision: float | None
    confidence: float | None
    taken_for: str | None
    taken_for_count: int
    confidence_calibrated: float | None = None


def class_rows(
    predictions: Predictions,
    names: Sequence[str],
    trained: Sequence[int] | None = None,
    groups: Sequence[str] | None = None,
) -> list[ClassRow]:
    """Return one row per class, in label order."""
    c, targets_n, predicted_n = len(names), predictions.targets, predictions.predicted
    images, guesses = np.bincount(targets_n, minlength=c), np.bincount(predicted_n, minlength=c)
    hits = np.bincount(targets_n[targets_n == predicted_n], minlength=c)
    top5_hits = np.bincount(targets_n[predictions.in_top5], minlength=c)
    confidence_sums = np.bincount(targets_n, weights=predictions.confidence, minlength=c)
    calibrated = predictions.calibrated
    sums = None if calibrated is None else np.bincount(targets_n, weights=calibrated, minlength=c)
    worst: dict[int, Pair] = {}
    for pair in worst_pairs(confuse(targets_n, predicted_n, c), len(targets_n)):
        worst.setdefault(pair.true, pair)

    def rate(part: float, of: int) -> float | None:
        return 100.0 * part / of if of else None

    return [
        ClassRow(
            label=i,
            name=names[i],
            group=None if groups is None else groups[i],
            trained=None if trained is None else int(trained[i]),
            images=int(images[i]),
            top1=rate(int(hits[i]), int(images[i])),
            top5=rate(int(top5_hits[i]), int(images[i])),
            precision=rate(int(hits[i]), int(guesses[i])),
            confidence=rate(float(confidence_sums[i]), int(images[i])),
            taken_for=names[worst[i].predicted] if i in worst else None,
            taken_for_count=worst[i].count if i in worst else 0,
            confidence_calibrated=None if sums is None else rate(float(sums[i]), int(images[i])),
        )
        for i in range(c)
    ]


@dataclass(frozen=True)
class Calibration:
    """Accuracy and confidence in B bins of equal width of the confidence; the last bin includes 1.

    Attributes:
        count: images, int64 [B].
        confidence, accuracy: means, [B]; NaN without images.
        error: expected calibration error in percent (Naeini et al., AAAI 2015).
    """

    count: Labels
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    error: float


def calibration(
    predictions: Predictions, bins: int, confidence: NDArray[np.float64] | None = None
) -> Calibration:
    """Compare confidence and accuracy.

    Args:
        confidence: [N]. Default: that of the predictions.
    """
    hits = predictions.targets == predictions.predicted
    confidence = predictions.confidence if confidence is None else confidence
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    count = np.bincount(index, minlength=bins)
    confidence_sums = np.bincount(index, weights=confidence, minlength=bins)
    correct = np.bincount(index, weights=hits.astype(np.float64), minlength=bins)
    error = 100.0 * float(np.abs(correct - confidence_sums).sum()) / max(1, len(index))
    with np.errstate(invalid="ignore"):
        return Calibration(count, confidence_sums / count, correct / count, error)


def neighbors_together(confusion: Confusion) -> Labels:
    """Order the classes so that often confused ones are adjacent; label order beyond 2,000 classes."""
    c = confusion.num_classes
    if c > _MAX_SORTED:
        return np.arange(c)
    close = np.zeros((c, c))
    np.add.at(close, (confusion.true, confusion.predicted), confusion.share())
    close = np.minimum(1.0, close + close.T)
    return cluster_order(1.0 - close)


def cluster_order(distances_cc: NDArray[np.float64]) -> Labels:
    """Order items so that close ones are adjacent: the leaves of an average-linkage tree."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(distances_cc) < 3:
        return np.arange(len(distances_cc))
    return np.asarray(leaves_list(linkage(squareform(distances_cc, checks=False), "average")), dtype=np.int64)
