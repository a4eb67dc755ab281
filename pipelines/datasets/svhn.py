"""SVHN, cropped digits (Netzer et al., 2011), from the official MATLAB files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.arrays import (
    ArrayDataset,
    Split,
    array_dataset,
    damaged,
    integers,
    require,
    subfolder,
)
from pipelines.longtail import long_tail_legacy

_SOURCE = "{files}, the official cropped digits"
_CLASSES = tuple("0123456789")
_KINDS = ("double", "single", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
"""Types of variables whose values are in the file. Structures and cells allocate the size that their header claims."""


def load_svhn(root: Path, split: Split) -> ArrayDataset:
    """SVHN: 73,257 training and 26,032 test images of 32×32 pixels, classes ``0`` to ``9``.

    In the files, the digit 0 has label 10; here it has label 0.

    Args:
        root: the folder that contains the two files.
        split: ``val`` is the published test set.

    Raises:
        UserError: the file is missing or damaged (``data.root``).
    """
    source = _SOURCE.format(files="train_32x32.mat and test_32x32.mat")
    return _load(root, "train" if split == "train" else "test", source)


def load_svhn_lt_legacy(root: Path, imbalance: float) -> ArrayDataset:
    """SVHN-LT of the authors' code, with a third of its labels wrong. Use it only to reproduce their figures.

    The training images and the 531,131 extra images are made long-tailed separately and labeled by
    ``long_tail_legacy`` (``SVHN_LT`` of DL2PA and Yang et al.). Digit 0 has too few images in both.

    Args:
        root: the folder that contains the three files.
        imbalance: ``data.imbalance``.

    Raises:
        UserError: a file is missing or damaged (``data.root``); a class would keep no image
            (``data.imbalance``).
    """
    source = _SOURCE.format(files="train_32x32.mat, extra_32x32.mat and test_32x32.mat")
    parts: list[ArrayDataset] = []
    for name in ("train", "extra"):
        full = _load(root, name, source)
        parts.append(full.subset(*long_tail_legacy(full.labels, full.classes, imbalance)))
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return array_dataset(images, labels, _CLASSES, root)


def _load(root: Path, part: Literal["train", "test", "extra"], source: str) -> ArrayDataset:
    from scipy.io import loadmat, whosmat

    folder = subfolder(root, "svhn", source)
    path = require(root, folder / f"{part}_32x32.mat", source)
    try:
        for variable, _, kind in whosmat(path):
            if variable in ("X", "y") and kind not in _KINDS:
                raise damaged(path, f"its {variable!r} is of the type {kind!r}, not an array of numbers")
        content = loadmat(path, variable_names=["X", "y"])
        images = _bytes_of(path, content["X"])
        labels = integers(path, "its 'y'", content["y"]).reshape(-1)
    except UserError:
        raise
    except Exception as error:  # SciPy does not document its exceptions for damaged files.
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise damaged(path, f"its 'X' has shape {images.shape}, not (32, 32, 3, n)")
    labels = np.where(labels == 10, 0, labels)
    return array_dataset(images.transpose(3, 0, 1, 2), labels, _CLASSES, path)


def _bytes_of(path: Path, stored: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixel values as bytes; in a file that was saved again they may be floating-point numbers."""
    if stored.dtype == np.uint8:
        return stored
    values = stored.astype(np.uint8)
    if not np.array_equal(values, stored):
        raise damaged(path, "its 'X' contains values that are not integers from 0 to 255")
    return values
