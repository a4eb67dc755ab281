"""Selection of validation images to show: confident errors, confident correct predictions and the hardest classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dl2pa.reporting.class_metrics import Labels

_ERRORS, _HITS, _CLASSES, _PER_CLASS = 24, 12, 12, 6


@dataclass(frozen=True)
class SampleSelection:
    """Indices into the predictions.

    Attributes:
        errors: most confident errors, preferably at most two per pair of classes.
        hits: most confident correct predictions, preferably one per class.
        by_class: for the classes with the lowest accuracy, lowest first: the most confident errors, then the least
            confident correct predictions.
    """

    errors: list[int]
    hits: list[int]
    by_class: dict[int, list[int]]

    @property
    def all(self) -> list[int]:
        """Every index once, ascending."""
        return sorted({*self.errors, *self.hits, *(i for one in self.by_class.values() for i in one)})


def select_samples(
    targets_n: Labels, predicted_n: Labels, confidence_n: NDArray[np.float64]
) -> SampleSelection:
    """Select from N predictions; ties in confidence are broken by index."""
    order = np.argsort(-confidence_n, kind="stable")
    wrong = order[targets_n[order] != predicted_n[order]]
    right = order[targets_n[order] == predicted_n[order]]
    pairs = list(zip(targets_n[wrong].tolist(), predicted_n[wrong].tolist(), strict=True))
    errors = _diversify(wrong.tolist(), pairs, 2, _ERRORS)
    hits = _diversify(right.tolist(), targets_n[right].tolist(), 1, _HITS)
    images = np.bincount(targets_n)
    accuracy = np.bincount(targets_n[right], minlength=len(images)) / np.maximum(1, images)
    accuracy[images == 0] = 2.0
    worst = [c for c in np.argsort(accuracy, kind="stable")[:_CLASSES].tolist() if images[c]]
    by_class: dict[int, list[int]] = {}
    for c in worst:
        missed, recognized = wrong[targets_n[wrong] == c].tolist(), right[targets_n[right] == c].tolist()
        by_class[c] = [*missed, *reversed(recognized)][:_PER_CLASS]
    return SampleSelection(errors, hits, by_class)


def _diversify(samples: list[int], kinds: Sequence[object], most: int, limit: int) -> list[int]:
    """Take up to `limit` samples in order, at most `most` per kind; fill up with the skipped ones."""
    seen: dict[object, int] = {}
    first: list[int] = []
    rest: list[int] = []
    for sample, kind in zip(samples, kinds, strict=True):
        seen[kind] = seen.get(kind, 0) + 1
        (first if seen[kind] <= most else rest).append(sample)
        if len(first) == limit:
            break
    return [*first, *rest][:limit]
