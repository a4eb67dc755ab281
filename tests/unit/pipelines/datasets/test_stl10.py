from pathlib import Path

import numpy as np
import pytest

from dl2pa.errors import UserError
from pipelines.datasets.stl10 import load_stl10

NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)


@pytest.fixture
def stl10(tmp_path: Path) -> Path:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(NAMES) + "\n")
    for part, images, labels in [("train", IMAGES[:2], [1, 10]), ("test", IMAGES[2:], [4])]:
        with (folder / f"{part}_X.bin").open("wb") as file:
            for image in images:
                for channel in range(3):
                    for column in range(96):
                        file.write(image[:, column, channel].tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(labels))
    return folder


def test_images_are_transposed_and_labels_start_at_zero(stl10: Path) -> None:
    train = load_stl10(stl10.parent, "train")
    np.testing.assert_array_equal(train.images, IMAGES[:2])
    assert train.labels.tolist() == [0, 9]
    assert train.classes == tuple(NAMES)
    val = load_stl10(stl10, "val")
    np.testing.assert_array_equal(val.images, IMAGES[2:])
    assert val.labels.tolist() == [3]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train_X.bin", IMAGES.tobytes()[:1000], "not a multiple"),
        ("train_X.bin", b"", "0 images and 2 labels"),
        ("train_y.bin", bytes([1]), "2 images and 1 labels"),
        ("train_y.bin", bytes([0, 1]), "from -1 to 0"),
        ("class_names.txt", b"airplane bird", "has 2 class names"),
        ("train_X.bin", None, "no file .*train_X.bin"),
        ("class_names.txt", None, "no file .*class_names.txt"),
    ],
)
def test_missing_and_damaged_files(stl10: Path, name: str, content: bytes | None, words: str) -> None:
    (stl10 / name).unlink()
    if content is not None:
        (stl10 / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_stl10(stl10.parent, "train")
    assert caught.value.field == "data.root"
