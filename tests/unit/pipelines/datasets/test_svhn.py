from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from dl2pa.errors import UserError
from pipelines.datasets.svhn import load_svhn


def write(path: Path, count: int = 3, first_label: int = 9) -> np.ndarray:
    images = np.random.default_rng(count).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    labels = np.arange(first_label, first_label + count, dtype=np.uint8)[:, None]
    savemat(path, {"X": images, "y": labels})
    return images


def test_reads_both_halves_and_calls_ten_zero(tmp_path: Path) -> None:
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


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    write(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be used"):
        load_svhn(tmp_path, "train")
