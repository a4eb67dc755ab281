"""Images to evaluate a trained model on: class folders, or the index of lists, Parquet files or tar shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets import refuse_without_index
from pipelines.datasets.classes import check_known
from pipelines.datasets.folder import index_folder, is_image, is_split_folder, list_images
from pipelines.datasets.index import INDEX_NAME, open_index
from pipelines.datasets.shards import check_verified
from pipelines.datasets.table import ImageTable, PathTable

_SPLITS = ("val", "all", "train")
"""Splits of an index in order of preference."""
_MAX_SHOWN = 3


def open_images(root: Path, field: str, *, flat: bool = False) -> ImageTable:
    """Open the images of a folder with their own classes: its validation split, if it has splits.

    Args:
        root: folder with an index, with one folder of images per class, or with such a folder ``val``.
        field: option that names the folder, for messages.
        flat: also accept a folder of images without classes; they get one class.

    Raises:
        UserError: the folder is missing, contains no images, or needs an index (`field`); its index is damaged or
            older than the data (``data.index``).
    """
    check_verified(root, field)
    if (root / INDEX_NAME).is_file():
        splits = open_index(root / INDEX_NAME, root).splits
        return next(splits[name].table for name in _SPLITS if name in splits)
    refuse_without_index(root, field)
    if flat and root.is_dir() and any(is_image(path.name) for path in root.iterdir() if path.is_file()):
        files = list_images(root, ".", field)
        paths = PathTable.of(file.path for file in files)
        return ImageTable.of(root, paths, [file.size for file in files], [0] * len(files), (root.name,))
    return index_folder(root / "val" if is_split_folder(root / "val") else root, None, field)


def with_model_classes(
    table: ImageTable, classes: list[str], name: str, field: str, *, only_present: bool
) -> tuple[ImageTable, NDArray[np.int64]]:
    """Label images by the classes of a model; classes are matched by name.

    Args:
        classes: the C class names of the model in label order.
        name: the set, for messages.
        only_present: keep only the classes that have images.

    Returns:
        The images with the kept classes in the model's order, and the labels [K] of these classes in the model.

    Raises:
        UserError: a class is unknown to the model; or without `only_present` a class of the model has no images.
    """
    present = [table.classes[label] for label in np.unique(table.labels).tolist()]
    remedy = (
        "Classes are matched by name: rename the folder, or the entry of the class list, as in the model."
    )
    check_known(present, classes, table.root, field, name, remedy)
    known = set(present)
    missing = [one for one in classes if one not in known]
    if missing and not only_present:
        more = ", …" if len(missing) > _MAX_SHOWN else ""
        shown = ", ".join(map(repr, missing[:_MAX_SHOWN])) + more
        message = f"has no images of {len(missing):,} of the model's {len(classes):,} classes: {shown}"
        remedy = "Add --only-present-classes to choose only among the classes with images, or add images."
        raise UserError(field, name, message, remedy)
    kept = np.array([label for label, one in enumerate(classes) if one in known], dtype=np.int64)
    names = tuple(classes[label] for label in kept.tolist())
    position = {one: label for label, one in enumerate(names)}
    label_of = np.array([position.get(one, -1) for one in table.classes], dtype=np.int64)
    return table.relabeled(names, label_of), kept
