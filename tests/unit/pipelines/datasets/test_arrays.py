from pathlib import Path

import numpy as np
import pytest

from dl2pa.errors import UserError
from pipelines.datasets.arrays import array_dataset

IMAGES = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
LABELS = np.array([0, 1, 2, 1])
CLASSES = ("a", "b", "c")
SOURCE = Path("somewhere")


def test_fingerprint_depends_on_pixels_labels_and_shapes() -> None:
    def fingerprint(images: np.ndarray, labels: np.ndarray = LABELS) -> str:
        return array_dataset(images, labels, CLASSES, SOURCE).fingerprint

    first = fingerprint(IMAGES)
    other_pixel = IMAGES.copy()
    other_pixel[3, 1, 1, 2] += 1
    others = [
        fingerprint(other_pixel),
        fingerprint(IMAGES, np.array([0, 1, 1, 2])),
        fingerprint(IMAGES.reshape(4, 1, 4, 3)),
    ]
    assert len(first) == 16
    assert first not in others
    assert len(set(others)) == 3
    assert fingerprint(np.asfortranarray(IMAGES)) == first
    assert fingerprint(IMAGES, LABELS.astype(np.int32)) == first


def test_images_are_contiguous_and_labels_int64() -> None:
    dataset = array_dataset(np.asfortranarray(IMAGES), LABELS.astype(np.int8), CLASSES, SOURCE)
    assert dataset.images.flags.c_contiguous
    assert dataset.labels.dtype == np.int64
    assert len(dataset) == 4


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (IMAGES[:0], LABELS[:0], "0 images"),
        (IMAGES, LABELS[:3], "4 images and 3 labels"),
        (IMAGES, LABELS + 1, "from 1 to 3, but it has 3 class names"),
        (IMAGES, LABELS - 1, "from -1 to 1"),
    ],
)
def test_inconsistent_arrays_are_refused(images: np.ndarray, labels: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        array_dataset(images, labels, CLASSES, SOURCE)
    assert (caught.value.field, caught.value.value) == ("data.root", "somewhere")
