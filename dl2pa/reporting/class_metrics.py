"""What predictions image by image add up to: confusions, classes, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Confusion:
    """The cells of the confusion matrix that are not empty, by true and then by predicted class.

    Attributes:
        true, predicted: int64 [M], classes.
        count: int64 [M], images.
        totals: int64 [C], images of each true class.
    """

    true: Labels
    predicted: Labels
    count: Labels
    totals: Labels

    @property
    def num_classes(self) -> int:
        return len(self.totals)

    def share(self) -> NDArray[np.float64]:
        """Each cell's part of its true class's images, [M]."""
        return self.count / np.maximum(1, self.totals[self.true])


def confuse(targets_n: Labels, predicted_n: Labels, num_classes: int) -> Confusion:
    """Count true and predicted classes; memory grows with the images, not with C squared."""
    keys, count = np.unique(targets_n * num_classes + predicted_n, return_counts=True)
    totals = np.bincount(targets_n, minlength=num_classes)
    return Confusion(keys // num_classes, keys % num_classes, count.astype(np.int64), totals)


@dataclass(frozen=True)
class Pair:
    """Images of one class taken for another; `share` of the true class's images, `back` of the other way round."""

    true: int
    predicted: int
    count: int
    share: float
    back: int


def worst_pairs(confusion: Confusion, limit: int) -> list[Pair]:
    """The pairs of different classes with the most images, then by the larger share, then in label order."""
    off = confusion.true != confusion.predicted
    true, predicted = confusion.true[off], confusion.predicted[off]
    count, share = confusion.count[off], confusion.share()[off]
    order = np.lexsort((predicted, true, -share, -count))[:limit]
    back = {(t, p): n for t, p, n in zip(true.tolist(), predicted.tolist(), count.tolist(), strict=True)}
    return [
        Pair(
            *(t := int(true[i]), p := int(predicted[i])),
            *(int(count[i]), float(share[i]), back.get((p, t), 0)),
        )
        for i in order
    ]


@dataclass(frozen=True)
class ClassRow:
    """One class on the validation set; accuracies in per cent, None where there is nothing to divide by.

    Attributes:
        trained: images of the class in the training set, where known.
        top1, top5: of the class's images (recall).
        precision: of the images taken for the class.
        confidence: mean, in what was predicted for its images, per cent.
        taken_for: the other class its images are most often taken for, and how many.
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


def class_rows(
    targets_n: Labels,
    predicted_n: Labels,
    confidence_n: NDArray[np.float64],
    in_top5_n: NDArray[np.bool_],
    names: Sequence[str],
    trained: Sequence[int] | None = None,
    groups: Sequence[str] | None = None,
) -> list[ClassRow]:
    """A row for each class, in label order."""
    c = len(names)
    images, guesses = np.bincount(targets_n, minlength=c), np.bincount(predicted_n, minlength=c)
    hits = np.bincount(targets_n[targets_n == predicted_n], minlength=c)
    near = np.bincount(targets_n[in_top5_n], minlength=c)
    sure = np.bincount(targets_n, weights=confidence_n, minlength=c)
    most: dict[int, Pair] = {}
    for pair in worst_pairs(confuse(targets_n, predicted_n, c), len(targets_n)):
        most.setdefault(pair.true, pair)

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
            top5=rate(int(near[i]), int(images[i])),
            precision=rate(int(hits[i]), int(guesses[i])),
            confidence=rate(float(sure[i]), int(images[i])),
            taken_for=names[most[i].predicted] if i in most else None,
            taken_for_count=most[i].count if i in most else 0,
        )
        for i in range(c)
    ]


@dataclass(frozen=True)
class Bin:
    """Images whose confidence lies in [low, high); the last bin holds 1 too. Means in 0..1, None without images."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def reliability(
    hits_n: NDArray[np.bool_], confidence_n: NDArray[np.float64], bins: int = 15
) -> tuple[list[Bin], float]:
    """Bins of equal width, and the expected calibration error over them (per cent; Naeini et al., AAAI 2015)."""
    place = np.minimum((confidence_n * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    sure = np.bincount(place, weights=confidence_n, minlength=bins)
    right = np.bincount(place, weights=hits_n.astype(np.float64), minlength=bins)
    error = 100.0 * float(np.abs(right - sure).sum()) / max(1, len(place))
    found = [
        Bin(i / bins, (i + 1) / bins, n, sure[i] / n if n else None, right[i] / n if n else None)
        for i, n in enumerate(count.tolist())
    ]
    return found, error


def neighbors_together(confusion: Confusion, most: int = 2000) -> Labels:
    """An order of the classes in which those often confused are neighbors: the leaves of an average-linkage tree.
    Beyond `most` classes, label order."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    c = confusion.num_classes
    if not 3 <= c <= most:
        return np.arange(c)
    close = np.zeros((c, c))
    np.add.at(close, (confusion.true, confusion.predicted), confusion.share())
    close = np.minimum(1.0, close + close.T)
    np.fill_diagonal(close, 1.0)
    return np.asarray(leaves_list(linkage(squareform(1.0 - close, checks=False), "average")), dtype=np.int64)
