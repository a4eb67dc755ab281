"""Validation split drawn from class folders that have none (``data.val_fraction``).

The images of a class are ordered by a hash of their path below the folder of the classes, and the first ones are the
validation images. The split therefore depends on nothing but the paths, the fraction and `SPLIT_SEED`: not on
``train.seed``, the loader, the number of processes, the location of the folder or the use of an index. An image that is
added later moves at most one other image of its class to the other split.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.arrays import Split
from pipelines.datasets.skipped import SkippedFiles
from pipelines.datasets.table import ImageTable, PathTable

SPLIT_SEED = 0
"""Key of the hash. Never change it: every run with ``data.val_fraction`` would have another split."""
FIELD = "data.val_fraction"


def draw_split(table: ImageTable, fraction: float, split: Split) -> ImageTable:
    """One split of a data set without validation images, in the order of its images.

    Of n images of a class, the fraction, rounded to the nearest integer, is for validation: at least one image, and at
    most n - 1. A class with one image has no validation image.

    Args:
        table: all images, one file each.
        fraction: ``data.val_fraction``, in (0, 1).

    Raises:
        UserError: the images are in tar shards, or every class has one image (``data.val_fraction``).
    """
    if table.members is not None:
        remedy = "Train from the class folders, or set data.val_root to images for validation."
        raise UserError(FIELD, fraction, f"draws from class folders, but {table.root} has tar shards", remedy)
    is_val = draw(table.files, table.labels, fraction)
    if not is_val.any():
        remedy = "Add images to the class folders, or validate on a folder of other images (data.val_root)."
        raise UserError(FIELD, fraction, "leaves no validation images: no class has two images", remedy)
    part = table.subset(np.flatnonzero(is_val if split == "val" else ~is_val))
    return part if split == "train" else replace(part, skipped=SkippedFiles())  # they are counted once


def draw(paths: PathTable, labels: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Whether each image is for validation, [N].

    Args:
        paths: N paths relative to the folder of the classes.
        labels: [N].
    """
    counts = np.bincount(labels)
    taken = np.clip(np.floor(counts * fraction + 0.5).astype(np.int64), 1, np.maximum(counts - 1, 0))
    order = np.lexsort((_hashes(paths), labels))  # class by class, in the order of the hashes
    begin = np.cumsum(counts) - counts
    position = np.arange(len(labels)) - begin[labels[order]]
    is_val = np.zeros(len(labels), dtype=np.bool_)
    is_val[order] = position < taken[labels[order]]
    return is_val


def _hashes(paths: PathTable) -> NDArray[np.uint64]:
    key = SPLIT_SEED.to_bytes(8, "little")
    names = (path.encode("utf-8", "surrogateescape") for path in paths)
    digests = b"".join(hashlib.blake2b(name, digest_size=8, key=key).digest() for name in names)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
