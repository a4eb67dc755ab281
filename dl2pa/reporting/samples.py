"""Which images of the validation set are worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dl2pa.reporting.class_metrics import Labels

MISTAKES, HITS, CLASSES, OF_A_CLASS = 24, 12, 12, 6


@dataclass(frozen=True)
class Chosen:
    """Samples by their place among the predictions.

    Attributes:
        mistakes: the most confident wrong ones, at most two of the same pair of classes.
        hits: the most confident right ones, each of another class where there are enough.
        by_class: of the classes with the lowest accuracy, worst first: the most confident mistakes, then the
            least confident hits.
    """

    mistakes: list[int]
    hits: list[int]
    by_class: dict[int, list[int]]

    @property
    def all(self) -> list[int]:
        """Each once, ascending."""
        return sorted({*self.mistakes, *self.hits, *(i for one in self.by_class.values() for i in one)})


def choose(targets_n: Labels, predicted_n: Labels, confidence_n: NDArray[np.float64]) -> Chosen:
    """Choose from N predictions; equal confidences in the order of the set."""
    order = np.argsort(-confidence_n, kind="stable")
    wrong = order[targets_n[order] != predicted_n[order]]
    right = order[targets_n[order] == predicted_n[order]]
    pairs = list(zip(targets_n[wrong].tolist(), predicted_n[wrong].tolist(), strict=True))
    mistakes = _spread(wrong.tolist(), pairs, 2, MISTAKES)
    hits = _spread(right.tolist(), targets_n[right].tolist(), 1, HITS)
    images = np.bincount(targets_n)
    rates = np.bincount(targets_n[right], minlength=len(images)) / np.maximum(1, images)
    rates[images == 0] = 2.0
    worst = [c for c in np.argsort(rates, kind="stable")[:CLASSES].tolist() if images[c]]
    by_class: dict[int, list[int]] = {}
    for c in worst:
        missed, met = wrong[targets_n[wrong] == c].tolist(), right[targets_n[right] == c].tolist()
        by_class[c] = [*missed, *reversed(met)][:OF_A_CLASS]
    return Chosen(mistakes, hits, by_class)


def _spread(samples: list[int], kinds: Sequence[object], most: int, limit: int) -> list[int]:
    """The first samples with at most `most` of a kind, filled up with the others in their order."""
    seen: dict[object, int] = {}
    first: list[int] = []
    rest: list[int] = []
    for sample, kind in zip(samples, kinds, strict=True):
        seen[kind] = seen.get(kind, 0) + 1
        (first if seen[kind] <= most else rest).append(sample)
        if len(first) == limit:
            break
    return [*first, *rest][:limit]
