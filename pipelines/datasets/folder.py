"""Data sets of image files in ImageNet's layout: one folder per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dl2pa.errors import UserError
from pipelines.datasets.arrays import Split
from pipelines.datasets.classes import check_known
from pipelines.datasets.table import ImageTable, PathTable

IMAGE_SUFFIXES = frozenset({"jpeg", "jpg", "png", "webp", "bmp"})
_SCAN_THREADS = 16
_LAYOUT = "It must hold one folder of images per class"


@dataclass(frozen=True)
class ImageFile:
    """An image file: its path below the folder scanned, and its size in bytes."""

    path: str
    size: int


def index_folder(root: Path, classes: Sequence[str] | None, field: str) -> ImageTable:
    """List the images below ``root``, one folder per class, in the same order on every machine.

    Images lie in the class folder or one folder further down (Tiny-ImageNet's ``images/``). Classes and paths
    are sorted by code point; hidden files and files that are not images are passed over; links are followed.

    Args:
        root: the folder of the class folders.
        classes: the class names in label order, some perhaps without a folder; None takes the folders' names,
            each of which must then hold an image.
        field: the config key that named ``root``, for messages.

    Raises:
        UserError: ``root`` is missing, no directory, unreadable, or holds no class folders or no images
            (``field``); a folder has no class (``data.classes``).
    """
    folders = class_folders(root, field)
    if classes is not None:
        remedy = "Add the class to data.classes, or move the folder away."
        check_known(folders, classes, root, "data.classes", None, remedy)
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        found = list(pool.map(lambda name: list_images(root, name, field), folders))
    empty = [name for name, images in zip(folders, found, strict=True) if not images]
    if len(empty) == len(folders):
        raise UserError(
            field, str(root), f"holds {len(folders):,} folders but no images", f"{_LAYOUT}, {_suffixes()}."
        )
    if empty and classes is None:
        remedy = "Remove the folder, or list every class with data.classes if some have no images."
        more = f" and {len(empty) - 1:,} more" if len(empty) > 1 else ""
        raise UserError(field, str(root), f"the class folder {empty[0]!r}{more} holds no images", remedy)
    names = tuple(folders if classes is None else classes)
    label_of = {name: label for label, name in enumerate(names)}
    # Sorted by folder, not by label: the order of the samples does not hang on that of data.classes.
    labels = np.repeat([label_of[name] for name in folders], [len(images) for images in found])
    flat = [image for images in found for image in images]
    return ImageTable.of(root, PathTable.of(i.path for i in flat), [i.size for i in flat], labels, names)


def open_folders(
    root: Path,
    val_root: Path | None,
    classes: tuple[str, ...] | None,
    split: Split,
    learned: tuple[str, ...] | None = None,
) -> ImageTable:
    """List one half of an image folder; both halves have the same classes in the same order.

    Args:
        learned: the classes of training where they are known already.

    Raises:
        UserError: as ``split_root`` and ``index_folder``, or a validation folder that training does not have.
    """
    folder, field = split_root(root, val_root, split)
    if split == "val" and classes is None:
        classes = learned or tuple(class_folders(*split_root(root, val_root, "train")))
        remedy = "Move the folder away, or list the classes of both halves with data.classes."
        check_known(class_folders(folder, field), classes, folder, field, str(val_root or root), remedy)
    return index_folder(folder, classes, field)


def class_folders(root: Path, field: str) -> list[str]:
    """The names of the class folders in ``root``, sorted; hidden ones are passed over.

    Raises:
        UserError: ``root`` is missing, no directory, unreadable, or holds no folder (``field``).
    """
    names = sorted(entry.name for entry in _entries(root, field) if entry.is_dir())
    if not names:
        raise UserError(field, str(root), "holds no class folders", f"{_LAYOUT}.")
    return names


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does, in either case."""
    _, dot, suffix = name.rpartition(".")
    return bool(dot) and suffix.lower() in IMAGE_SUFFIXES


def list_images(root: Path, folder: str, field: str, nested: bool = True) -> list[ImageFile]:
    """The images in ``root/folder``, and if ``nested`` in the folders right below it, sorted by path.

    Raises:
        UserError: a folder nested too deep, one that cannot be read, or a broken link (``field``).
    """
    found: list[ImageFile] = []
    for entry in _entries(root / folder, field):
        path = f"{folder}/{entry.name}"
        if entry.is_dir():
            if not nested:
                remedy = f"{_LAYOUT}, with at most one folder between the class and its images."
                raise UserError(field, str(root), f"the folder {path} lies too deep", remedy)
            found.extend(list_images(root, path, field, nested=False))
        elif is_image(entry.name):
            found.append(ImageFile(path, _size(root, path, entry, field)))
    return sorted(found, key=lambda image: image.path)


def split_root(root: Path, val_root: Path | None, split: Split) -> tuple[Path, str]:
    """Where a split's class folders lie, and the config key that says so.

    With ``val_root``, ``root`` is the training folder (or holds it as ``train``) and ``val_root`` the
    validation folder (or holds it as ``val``); without, ``root`` holds both.

    Raises:
        UserError: ``root`` exists but holds no folder of the split's name (``data.root``).
    """
    if val_root is not None:
        given, field = (root, "data.root") if split == "train" else (val_root, "data.val_root")
        inner = given / split
        return (inner if inner.is_dir() else given), field
    if root.is_dir() and not (root / split).is_dir():
        remedy = (
            "Put the class folders in train/ and val/ of data.root, "
            "or set data.root to the training folder and data.val_root to the validation folder."
        )
        raise UserError("data.root", str(root), f"holds no folder {split!r}", remedy)
    # A root that is missing altogether is reported as such, not as root/train.
    return (root / split if root.is_dir() else root), "data.root"


def _entries(folder: Path, field: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else "is not a directory"
        remedy = f"Set {field} to the folder of the images. {_LAYOUT}."
        raise UserError(field, str(folder), problem, remedy) from error
    except OSError as error:
        remedy = "Make the folder and what is in it readable by the user who trains."
        raise UserError(field, str(folder), f"cannot be read: {error.strerror or error}", remedy) from error


def _size(root: Path, path: str, entry: os.DirEntry[str], field: str) -> int:
    try:
        return entry.stat().st_size
    except OSError as error:
        problem = "is a broken link" if entry.is_symlink() else f"cannot be read: {error.strerror or error}"
        raise UserError(
            field, str(root), f"{path} {problem}", "Restore the file, or remove its entry."
        ) from error


def _suffixes() -> str:
    return "as files ending in " + ", ".join(f".{suffix}" for suffix in sorted(IMAGE_SUFFIXES))
