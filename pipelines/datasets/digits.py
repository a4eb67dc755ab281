"""A small real data set without download: scikit-learn's handwritten digits as JPEG files.

The digits are 1,797 scans of 8×8 pixels from the test set of Alpaydin and Kaynak's Optical Recognition of
Handwritten Digits (UCI, 1998).
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from dl2pa.osutil import read_json
from pipelines.datasets.arrays import Split
from pipelines.datasets.folder import index_folder
from pipelines.datasets.table import ImageTable
from pipelines.rng import random_bits

log = logging.getLogger(__name__)
_MARKER = "digits.json"
_VAL_FRACTION = 0.2
_MAX_VALUE = 16
_SPLIT_KEY = 0x64696769747300  # Not an rng.Stream: used once, when the files are written.


def write_digits(root: Path, seed: int = 0, size: int = 32) -> Path:
    """Write the digits in ImageNet's layout: ``root/train/<class>/NNNN.jpeg``, and the same below ``val``.

    The folder is created atomically, also by concurrent callers. A complete folder is left unchanged.

    Args:
        root: the folder to create.
        seed: selects the fifth of each class for validation.
        size: image side in pixels; the scans are enlarged with bicubic interpolation.

    Returns:
        ``root``.

    Raises:
        UserError: ``root`` contains other files, or cannot be written (``data.root``).
    """
    settings = {"seed": seed, "size": size}
    if has_digits(root):
        _warn_if_different(root, settings)
        return root
    _check_free(root)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
            # In a subfolder: the temporary folder itself is not readable for other users.
            complete = Path(scratch) / "digits"
            _write_images(complete, seed, size)
            (complete / _MARKER).write_text(json.dumps(settings) + "\n", encoding="utf-8")
            _move_into_place(complete, root)
    except OSError as error:
        remedy = "Set data.root to a folder that can be created."
        raise UserError(
            "data.root", str(root), f"cannot be written: {error.strerror or error}", remedy
        ) from error
    return root


def index_digits(root: Path, split: Split, classes: tuple[str, ...] | None) -> ImageTable:
    """Index one split of the digits; writes them first if `root` does not have them."""
    written = root if has_digits(root) else write_digits(root)
    return index_folder(written / split, classes, "data.root")


def has_digits(root: Path) -> bool:
    """Whether ``root`` is a complete folder written by ``write_digits``."""
    return (root / _MARKER).is_file()


def held_out(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """[N], true for the validation images: the fifth of each class with the smallest random numbers."""
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.argsort(random_bits(seed, _SPLIT_KEY, members), kind="stable")
        chosen[members[order[: round(_VAL_FRACTION * len(members))]]] = True
    return chosen


def _write_images(folder: Path, seed: int, size: int) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    labels: NDArray[np.int64] = digits.target.astype(np.int64)
    for split in ("train", "val"):
        for label in np.unique(labels):
            (folder / split / str(label)).mkdir(parents=True)
    for index, (scan, label, val) in enumerate(
        zip(digits.images, labels, held_out(labels, seed), strict=True)
    ):
        scaled = Image.fromarray((scan * (255 / _MAX_VALUE)).astype(np.float32))
        values = np.asarray(scaled.resize((size, size), Image.Resampling.BICUBIC))
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
        path = folder / ("val" if val else "train") / str(label) / f"{index:04d}.jpeg"
        image.save(path, format="JPEG", quality=95)


def _move_into_place(complete: Path, root: Path) -> None:
    try:
        complete.rename(root)
    except OSError:
        # Another process was faster; its folder has the same content.
        if not has_digits(root):
            raise
        shutil.rmtree(complete)


def _check_free(root: Path) -> None:
    remedy = "Set data.root to a new folder; the digits are written there."
    if root.is_dir():
        # Check for the marker again: another process may have created the folder in the meantime.
        if any(root.iterdir()) and not has_digits(root):
            raise UserError("data.root", str(root), "contains files that are not the digits data set", remedy)
    elif root.exists() or root.is_symlink():
        raise UserError("data.root", str(root), "is not a directory", remedy)


def _warn_if_different(root: Path, settings: dict[str, int]) -> None:
    written = read_json(root / _MARKER)
    if written != settings:
        log.warning("%s was written with %s and is left unchanged; requested %s", root, written, settings)
