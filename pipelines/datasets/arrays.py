"""Data sets small enough to be kept in memory as one array of images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.text import decode_text

Split = Literal["train", "val"]
"""Split of a data set. ``val`` is the published test set of data sets without a validation set."""


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """Decoded images with their labels.

    Attributes:
        images: [N, H, W, 3], RGB.
        labels: [N], indices into ``classes``.
        classes: the class names in label order.
        fingerprint: 16 hexadecimal digits that change with any shape, label or pixel.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, samples: NDArray[np.int64], labels: NDArray[np.int64] | None = None) -> ArrayDataset:
        """The images ``samples`` [M] in that order, optionally with other labels [M]."""
        labels = self.labels[samples] if labels is None else labels
        fingerprint = subset_fingerprint(self.fingerprint, samples, labels)
        return ArrayDataset(self.images[samples], labels, self.classes, fingerprint)


def array_dataset(
    images: NDArray[np.uint8], labels: NDArray[np.int64], classes: tuple[str, ...], source: Path
) -> ArrayDataset:
    """Build an ``ArrayDataset``: check the arrays and compute the fingerprint.

    Args:
        images: [N, H, W, 3] in any memory order.
        labels: [N].
        classes: the class names in label order.
        source: the folder or file, for the message.

    Raises:
        UserError: no images, unequal counts, or a label without a class (``data.root``).
    """
    if len(images) == 0 or len(images) != len(labels):
        raise damaged(source, f"it contains {len(images):,} images and {len(labels):,} labels")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise damaged(source, f"its labels are from {low} to {high}, but it has {len(classes)} class names")
    images = np.ascontiguousarray(images, dtype=np.uint8)
    labels = np.ascontiguousarray(labels, dtype=np.int64)
    return ArrayDataset(images, labels, classes, _fingerprint(images, labels))


def subfolder(root: Path, name: str, archive: str) -> Path:
    """The folder ``name`` of an unpacked archive if it is in ``root``, else ``root``.

    Raises:
        UserError: ``root`` is not a directory (``data.root``).
    """
    if not root.is_dir():
        problem = "is not a directory" if root.exists() else "does not exist"
        raise UserError(
            "data.root", str(root), problem, f"Set data.root to the folder that contains {name}/ ({archive})."
        )
    inner = root / name
    return inner if inner.is_dir() else root


def require(root: Path, path: Path, archive: str) -> Path:
    """Return ``path`` if it is a file.

    Raises:
        UserError: it is not a file; the remedy names the archive (``data.root``).
    """
    if not path.is_file():
        remedy = f"Unpack {archive} there, or set data.root to its folder."
        raise UserError("data.root", str(root), f"there is no file {path}", remedy)
    return path


def read_text(path: Path) -> str:
    """Read a text file of a data set.

    Raises:
        UserError: it cannot be read or is not UTF-8 (``data.root``).
    """
    try:
        return decode_text(path.read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from None


def integers(path: Path, what: str, values: object) -> NDArray[np.int64]:
    """Convert the integers of a file, perhaps stored as floating-point numbers.

    Args:
        what: the values, for the message: ``its 'labels'``.

    Raises:
        UserError: they are not integers (``data.root``).
    """
    try:
        array = np.asarray(values)
        result = array.astype(np.int64)
    except (TypeError, ValueError) as error:
        raise damaged(path, f"{what} are not integers") from error
    if array.dtype.kind not in "iuf" or not np.array_equal(array, result):
        raise damaged(path, f"{what} are not integers")
    return result


def damaged(path: Path, why: str) -> UserError:
    """The error for an invalid file of a data set."""
    return UserError(
        "data.root", str(path), f"cannot be used: {why}", "Download and unpack the data set again."
    )


def subset_fingerprint(fingerprint: str, samples: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    """Fingerprint of samples [M] with labels [M] of a data set with the given fingerprint."""
    digest = hashlib.sha256(fingerprint.encode())
    for column in (samples, labels):
        digest.update(column.astype("<i8").data)
    return digest.hexdigest()[:16]


def _fingerprint(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(repr((images.shape, labels.shape)).encode())
    digest.update(labels.astype("<i8").data)
    digest.update(images.data)
    return digest.hexdigest()[:16]
