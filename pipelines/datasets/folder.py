"""Image folders in ImageNet's layout: one folder per class."""

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
_LAYOUT = "It must contain one folder of images per class"


@dataclass(frozen=True)
class ImageFile:
    """Path of an image file relative to the listed folder, and its size in bytes."""

    path: str
    size: int


def index_folder(root: Path, classes: Sequence[str] | None, field: str) -> ImageTable:
    """List the images in the class folders of ``root``, in the same order on every machine.

    Images are in the class folder or in its subfolders (Tiny-ImageNet's ``images/``). Classes and paths are sorted
    by code point. Hidden files and files that are not images are ignored; links are followed.

    Args:
        root: the parent of the class folders.
        classes: the class names in label order, some perhaps without a folder. Default: the folder names; each
            folder must then contain an image.
        field: the config key of ``root``, for messages.

    Raises:
        UserError: ``root`` is missing, not a directory, unreadable, or has no class folders or no images
            (``field``); a folder is not in the class list (``data.classes``).
    """
    folders = class_folders(root, field)
    if classes is not None:
        remedy = "Add the class to data.classes, or move the folder elsewhere."
        check_known(folders, classes, root, "data.classes", None, remedy)
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        images_of = list(pool.map(lambda name: list_images(root, name, field), folders))
    empty = [name for name, images in zip(folders, images_of, strict=True) if not images]
    if len(empty) == len(folders):
        raise UserError(
            field, str(root), f"contains {len(folders):,} folders but no images", f"{_LAYOUT}, {_suffixes()}."
        )
    if empty and classes is None:
        remedy = "Move the folder elsewhere, or list every class with data.classes if some have no images."
        more = f" and {len(empty) - 1:,} more" if len(empty) > 1 else ""
        raise UserError(field, str(root), f"the class folder {empty[0]!r}{more} contains no images", remedy)
    names = tuple(folders if classes is None else classes)
    label_of = {name: label for label, name in enumerate(names)}
    # Sorted by folder, not by label: the sample order does not depend on data.classes.
    labels = np.repeat([label_of[name] for name in folders], [len(images) for images in images_of])
    files = [image for images in images_of for image in images]
    return ImageTable.of(root, PathTable.of(i.path for i in files), [i.size for i in files], labels, names)


def open_folders(
    root: Path,
    val_root: Path | None,
    classes: tuple[str, ...] | None,
    split: Split,
    train_classes: tuple[str, ...] | None = None,
) -> ImageTable:
    """List one split of an image folder; both splits have the same classes in the same order.

    Args:
        train_classes: the training classes, if already known.

    Raises:
        UserError: see ``split_root`` and ``index_folder``; a validation folder is not a training class.
    """
    folder, field = split_root(root, val_root, split)
    if split == "val" and classes is None:
        classes = train_classes or tuple(class_folders(*split_root(root, val_root, "train")))
        remedy = "Move the folder elsewhere, or list the classes of both splits with data.classes."
        check_known(class_folders(folder, field), classes, folder, field, str(val_root or root), remedy)
    return index_folder(folder, classes, field)


def class_folders(root: Path, field: str) -> list[str]:
    """Sorted names of the class folders in ``root``, without hidden ones.

    Raises:
        UserError: ``root`` is missing, not a directory, unreadable, or has no folders (``field``).
    """
    names = sorted(entry.name for entry in _entries(root, field) if entry.is_dir())
    if not names:
        raise UserError(field, str(root), "contains no class folders", f"{_LAYOUT}.")
    return names


def is_image(name: str) -> bool:
    """Whether a file name has an image suffix, in upper or lower case."""
    _, dot, suffix = name.rpartition(".")
    return bool(dot) and suffix.lower() in IMAGE_SUFFIXES


def list_images(root: Path, folder: str, field: str, nested: bool = True) -> list[ImageFile]:
    """The images in ``root/folder`` and, if ``nested``, in its direct subfolders, sorted by path.

    Raises:
        UserError: a folder is nested too deeply or cannot be read, or a link is broken (``field``).
    """
    images: list[ImageFile] = []
    for entry in _entries(root / folder, field):
        path = f"{folder}/{entry.name}"
        if entry.is_dir():
            if not nested:
                remedy = f"{_LAYOUT}, with at most one folder between the class and its images."
                raise UserError(field, str(root), f"the folder {path} is nested too deeply", remedy)
            images.extend(list_images(root, path, field, nested=False))
        elif is_image(entry.name):
            images.append(ImageFile(path, _size(root, path, entry, field)))
    return sorted(images, key=lambda image: image.path)


def split_root(root: Path, val_root: Path | None, split: Split) -> tuple[Path, str]:
    """Parent of a split's class folders, and the config key of that folder.

    With ``val_root``, ``root`` is the training folder (or contains it as ``train``) and ``val_root`` the validation
    folder (or contains it as ``val``). Otherwise, ``root`` contains both.

    Raises:
        UserError: ``root`` exists but has no folder with the name of the split (``data.root``).
    """
    if val_root is not None:
        folder, field = (root, "data.root") if split == "train" else (val_root, "data.val_root")
        inner = folder / split
        return (inner if inner.is_dir() else folder), field
    if root.is_dir() and not (root / split).is_dir():
        remedy = (
            "Put the class folders in train/ and val/ of data.root, "
            "or set data.root to the training folder and data.val_root to the validation folder."
        )
        raise UserError("data.root", str(root), f"contains no folder {split!r}", remedy)
    # A missing root is reported as root, not as root/train.
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
        remedy = "Make the folder and its content readable for the training user."
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
