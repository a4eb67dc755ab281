"""Wrong training labels at random (``data.label_noise``), to measure how robust a loss is against them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipelines.datasets.arrays import subset_fingerprint
from pipelines.datasets.holdout import Stored
from pipelines.rng import Stream, randint, uniform


def with_label_noise(train: Stored, fraction: float, seed: int) -> Stored:
    """Replace the label of each image, with probability `fraction`, by one of the other classes (symmetric noise).

    The draw of an image depends on `seed` and on its position in the split only.

    Args:
        train: training split, after ``data.val_fraction`` and ``data.imbalance``.
    """
    samples = np.arange(len(train), dtype=np.int64)
    is_wrong = uniform(seed, Stream.LABEL_NOISE, samples) < fraction
    shift = 1 + randint(len(train.classes) - 1, seed, Stream.LABEL_NOISE_CLASS, samples)
    labels = np.where(is_wrong, (train.labels + shift) % len(train.classes), train.labels)
    return replace(train, labels=labels, fingerprint=subset_fingerprint(train.fingerprint, samples, labels))
