"""SVHN, cropped digits (Netzer et al., 2011), from the official MATLAB files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.datasets.arrays import ArrayDataset, Split, array_dataset, damaged, require, subfolder

_SOURCE = "train_32x32.mat and test_32x32.mat from http://ufldl.stanford.edu/housenumbers"


def load_svhn(root: Path, split: Split) -> ArrayDataset:
    """SVHN: 73,257 training and 26,032 test images of 32×32 pixels, classes ``0`` to ``9``.

    The files call the digit zero 10; here it is label 0.

    Args:
        root: the folder of the two files.
        split: ``val`` is the published test set.

    Raises:
        UserError: the file is missing or damaged (``data.root``).
    """
    from scipy.io import loadmat

    folder = subfolder(root, "svhn", _SOURCE)
    path = require(root, folder / ("train_32x32.mat" if split == "train" else "test_32x32.mat"), _SOURCE)
    try:
        content = loadmat(path, variable_names=["X", "y"])
        images = np.asarray(content["X"], dtype=np.uint8)
        labels = np.asarray(content["y"], dtype=np.int64).reshape(-1)
    except Exception as error:  # SciPy documents no set of exceptions for a damaged file.
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise damaged(path, f"its 'X' has shape {images.shape}, not (32, 32, 3, n)")
    labels = np.where(labels == 10, 0, labels)
    return array_dataset(images.transpose(3, 0, 1, 2), labels, tuple("0123456789"), path)
