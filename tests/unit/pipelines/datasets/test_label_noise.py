"""Wrong training labels (`data.label_noise`), and validation images drawn from arrays and features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.datasets.arrays import ArrayDataset, array_dataset
from pipelines.datasets.features import FeatureDataset
from pipelines.datasets.holdout import Stored, draw_split
from pipelines.datasets.label_noise import with_label_noise
from pipelines.datasets.table import ImageTable, PathTable

COUNT, CLASSES = 4000, 5
NAMES = tuple(f"c{k}" for k in range(CLASSES))
LABELS = np.arange(COUNT, dtype=np.int64) % CLASSES


def arrays() -> ArrayDataset:
    return array_dataset(np.zeros((COUNT, 1, 1, 3), np.uint8), LABELS, NAMES, Path("here"))


def features() -> FeatureDataset:
    return FeatureDataset(np.arange(COUNT, dtype=np.float32)[:, None], LABELS, NAMES, "0" * 16, Path("here"))


def files() -> ImageTable:
    paths = PathTable.of(f"{k}/{i}.png" for i, k in enumerate(LABELS.tolist()))
    return ImageTable.of(Path("here"), paths, np.ones(COUNT, np.int64), LABELS, NAMES)


@pytest.mark.parametrize("make", [arrays, features, files])
def test_noise_is_symmetric_and_the_same_for_every_kind_of_data(make: Callable[[], Stored]) -> None:
    whole = make()
    noisy = with_label_noise(whole, 0.4, 0)
    is_wrong = noisy.labels != LABELS
    assert abs(is_wrong.mean() - 0.4) < 0.03
    shifts = np.bincount((noisy.labels - LABELS)[is_wrong] % CLASSES, minlength=CLASSES)
    assert shifts[0] == 0
    assert np.abs(shifts[1:] / is_wrong.sum() - 1 / (CLASSES - 1)).max() < 0.05
    assert np.array_equal(noisy.labels, with_label_noise(arrays(), 0.4, 0).labels)
    assert not np.array_equal(noisy.labels, with_label_noise(whole, 0.4, 1).labels)
    assert noisy.fingerprint != whole.fingerprint
    assert np.array_equal(whole.labels, LABELS), "the data set itself is unchanged"


@pytest.mark.parametrize("make", [arrays, features])
def test_a_validation_split_is_drawn_from_the_training_split(make: Callable[[], Stored]) -> None:
    whole = make()
    train, val = (draw_split(whole, 0.1, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (3600, 400)
    assert set(np.bincount(val.labels)) == {80}
    if isinstance(val, FeatureDataset) and isinstance(train, FeatureDataset):
        values = np.concatenate([train.features, val.features]).ravel()
        assert sorted(values.tolist()) == list(range(COUNT))
        assert np.array_equal(val.features, draw_split(features(), 0.1, "val").features)
