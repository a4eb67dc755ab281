"""Images of each class that are not trained on: validation split (``data.val_fraction``), calibration images
(``data.calibration_fraction``).

The images of a class are ordered by a hash of their path below the folder of the classes, and the first ones are held
out. The split therefore depends on nothing but the paths, the fraction and the seed of the hash: not on ``train.seed``,
the loader, the number of processes, the location of the folder or the use of an index. An image that is added later
moves at most one other image of its class to the other split. Images without a path of their own (arrays, features, tar
shards, Parquet files, the tables of a user's function) have their position in the training split in place of the path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.arrays import ArrayDataset, Split
from pipelines.datasets.features import FeatureDataset
from pipelines.datasets.skipped import SkippedFiles
from pipelines.datasets.table import ImageTable

SPLIT_SEED = 0
"""Key of the hash. Never change it: every run with ``data.val_fraction`` would have another split."""
CALIBRATION_SEED = 1
"""Key of the hash for ``data.calibration_fraction``, as fixed as `SPLIT_SEED`."""
FIELD = "data.val_fraction"
CALIBRATION_FIELD = "data.calibration_fraction"

Stored = ArrayDataset | ImageTable | FeatureDataset


def draw_split(table: Stored, fraction: float, split: Split) -> Stored:
    """One split of a data set without validation images, in the order of its images.

    Of n images of a class, the fraction, rounded to the nearest integer, is for validation: at least one image, and at
    most n - 1. A class with one image has no validation image.

    Args:
        table: all images: files, or arrays and features of which only the training split is used.
        fraction: ``data.val_fraction``, in (0, 1).

    Raises:
        UserError: the images are in tar shards, or every class has one image (``data.val_fraction``).
    """
    if isinstance(table, ImageTable) and table.members is not None:
        remedy = "Train from the class folders, or set data.val_root to images for validation."
        raise UserError(FIELD, fraction, f"draws from class folders, but {table.root} has tar shards", remedy)
    names = table.files if isinstance(table, ImageTable) else map(str, range(len(table)))
    is_val = draw(names, table.labels, fraction)
    if not is_val.any():
        remedy = "Add images to the class folders, or validate on a folder of other images (data.val_root)."
        raise UserError(FIELD, fraction, "leaves no validation images: no class has two images", remedy)
    part = table.subset(np.flatnonzero(is_val if split == "val" else ~is_val))
    if split == "val" and isinstance(part, ImageTable):
        return replace(part, skipped=SkippedFiles())  # they are counted once
    return part


def hold_out(train: Stored, fraction: float) -> tuple[Stored, Stored]:
    """Images to train on and images held out for calibration, both in the order of the data set.

    Of n images of a class, the fraction, rounded to the nearest integer, is held out, at most n - 1; of a class with
    few images perhaps none.

    Args:
        train: training split, after ``data.val_fraction`` and ``data.imbalance``.
        fraction: ``data.calibration_fraction``, in (0, 1).

    Raises:
        UserError: the fraction of every class is less than half an image (``data.calibration_fraction``).
    """
    names: Iterable[str] = map(str, range(len(train)))
    if isinstance(train, ImageTable) and train.members is None and train.own is None:
        names = train.files
    is_held = draw(names, train.labels, fraction, CALIBRATION_SEED, at_least=0)
    if not is_held.any():
        remedy = "Set a larger fraction, or 0 to calibrate with the validation images."
        raise UserError(CALIBRATION_FIELD, fraction, "holds out no image: the classes have too few", remedy)
    rest, held = train.subset(np.flatnonzero(~is_held)), train.subset(np.flatnonzero(is_held))
    return rest, replace(held, skipped=SkippedFiles()) if isinstance(held, ImageTable) else held


def draw(
    names: Iterable[str],
    labels: NDArray[np.int64],
    fraction: float,
    seed: int = SPLIT_SEED,
    at_least: int = 1,
) -> NDArray[np.bool_]:
    """Whether each image is held out, [N].

    Args:
        names: of N images: paths relative to the folder of the classes, or other unique texts.
        labels: [N].
        at_least: smallest number of images per class, except for a class with one image.
    """
    counts = np.bincount(labels)
    taken = np.clip(np.floor(counts * fraction + 0.5).astype(np.int64), at_least, np.maximum(counts - 1, 0))
    order = np.lexsort((_hashes(names, seed), labels))  # class by class, in the order of the hashes
    begin = np.cumsum(counts) - counts
    position = np.arange(len(labels)) - begin[labels[order]]
    is_held = np.zeros(len(labels), dtype=np.bool_)
    is_held[order] = position < taken[labels[order]]
    return is_held


def _hashes(paths: Iterable[str], seed: int) -> NDArray[np.uint64]:
    key = seed.to_bytes(8, "little")
    names = (path.encode("utf-8", "surrogateescape") for path in paths)
    digests = b"".join(hashlib.blake2b(name, digest_size=8, key=key).digest() for name in names)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
