from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from dl2pa.errors import UserError
from pipelines.datasets.svhn import load_svhn, load_svhn_lt_legacy


def write(path: Path, count: int = 3, first_label: int = 9) -> np.ndarray:
    images = np.random.default_rng(count).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    labels = np.arange(first_label, first_label + count, dtype=np.uint8)[:, None]
    savemat(path, {"X": images, "y": labels})
    return images


def test_both_splits_and_label_10_as_0(tmp_path: Path) -> None:
    train = write(tmp_path / "train_32x32.mat", count=2)
    val = write(tmp_path / "test_32x32.mat", count=3, first_label=1)
    dataset = load_svhn(tmp_path, "train")
    assert dataset.labels.tolist() == [9, 0]
    assert dataset.classes == tuple("0123456789")
    np.testing.assert_array_equal(dataset.images[1], train[..., 1])
    np.testing.assert_array_equal(load_svhn(tmp_path, "val").images[2], val[..., 2])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file .*train_32x32.mat"),
        (b"<html>404</html>", "cannot be used"),
        (b"", "cannot be used"),
        ({"X": np.zeros((32, 32, 3, 1), np.uint8)}, "KeyError: 'y'"),
        ({"X": np.zeros((1, 32, 32, 3), np.uint8), "y": np.ones((1, 1))}, "shape"),
        ({"X": np.zeros((32, 32, 3, 1), np.uint8), "y": np.full((1, 1), 11)}, "from 11 to 11"),
        ({"X": np.full((32, 32, 3, 1), 0.5), "y": np.ones((1, 1))}, "not integers from 0 to 255"),
        ({"X": np.zeros((32, 32, 3, 1), np.uint8), "y": np.full((1, 1), 1.5)}, "'y' are not integers"),
        ({"X": np.array([[1, 2]], dtype=object), "y": np.ones((1, 1))}, "'X' is of the type 'cell'"),
        ({"X": np.ones((1, 1)), "y": np.zeros((1, 2), [("a", "O")])}, "'y' is of the type 'struct'"),
    ],
)
def test_missing_and_damaged_files(tmp_path: Path, content: dict | bytes | None, words: str) -> None:
    path = tmp_path / "train_32x32.mat"
    if isinstance(content, dict):
        savemat(path, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_svhn(tmp_path, "train")
    assert caught.value.field == "data.root"


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    write(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be used"):
        load_svhn(tmp_path, "train")


def write_counts(path: Path, counts: list[int]) -> np.ndarray:
    """Images whose pixel values are their digit, in digit order."""
    digits = np.repeat(np.arange(10), counts)
    images = np.broadcast_to(digits.astype(np.uint8), (32, 32, 3, len(digits)))
    savemat(path, {"X": images, "y": np.where(digits == 0, 10, digits)[:, None]})
    return digits


def test_legacy_labels_are_wrong_after_a_short_digit(tmp_path: Path) -> None:
    # 20 images per digit on average. Digit 0 has 15 and 20 images, so only the first part has wrong labels.
    write_counts(tmp_path / "train_32x32.mat", [15, 25, *[20] * 8])
    write_counts(tmp_path / "extra_32x32.mat", [20] * 10)
    dataset = load_svhn_lt_legacy(tmp_path, 0.1)
    shares = [int(20 * 0.1 ** (k / 9)) for k in range(10)]
    first = sum(shares) - 5
    assert len(dataset) == 2 * sum(shares) - 5
    digits = dataset.images[:, 0, 0, 0]
    labels = np.repeat(np.arange(10), shares)
    np.testing.assert_array_equal(digits[:first], np.repeat(np.arange(10), [15, *shares[1:]]))
    np.testing.assert_array_equal(dataset.labels[:first], labels[:first])
    np.testing.assert_array_equal(digits[first:], labels)
    np.testing.assert_array_equal(dataset.labels[first:], labels)


def test_svhn_lt_legacy_needs_the_extra_images(tmp_path: Path) -> None:
    write_counts(tmp_path / "train_32x32.mat", [20] * 10)
    with pytest.raises(UserError, match=r"no file .*extra_32x32\.mat") as caught:
        load_svhn_lt_legacy(tmp_path, 0.1)
    assert "extra_32x32.mat" in caught.value.remedy
