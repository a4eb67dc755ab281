"""STL-10 (Coates, Lee and Ng, 2011), its labeled images, from the official binary files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.datasets.arrays import (
    ArrayDataset,
    Split,
    array_dataset,
    damaged,
    read_text,
    require,
    subfolder,
)

_SIDE = 96
_ARCHIVE = "stl10_binary.tar.gz, the authors' binary files"


def load_stl10(root: Path, split: Split) -> ArrayDataset:
    """STL-10: 5,000 training and 8,000 test images of 96×96 pixels, 10 classes.

    Args:
        root: the folder that contains ``stl10_binary``, or that folder.
        split: ``val`` is the published test set.

    Raises:
        UserError: a file is missing or damaged (``data.root``).
    """
    folder = subfolder(root, "stl10_binary", _ARCHIVE)
    part = "train" if split == "train" else "test"
    image_path = require(root, folder / f"{part}_X.bin", _ARCHIVE)
    label_path = require(root, folder / f"{part}_y.bin", _ARCHIVE)
    names = read_text(require(root, folder / "class_names.txt", _ARCHIVE)).split()
    values = np.fromfile(image_path, dtype=np.uint8)
    if values.size % (3 * _SIDE * _SIDE):
        raise damaged(image_path, f"its {values.size:,} bytes are not a multiple of a {_SIDE}×{_SIDE} image")
    # Stored as [n, channel, column, row].
    images = values.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 3, 2, 1)
    labels = np.fromfile(label_path, dtype=np.uint8).astype(np.int64) - 1
    return array_dataset(images, labels, tuple(names), folder)
