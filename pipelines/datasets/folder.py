"""Image folders in ImageNet's layout: one folder per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from dl2pa.errors import UserError
from pipelines.datasets.arrays import Split
from pipelines.datasets.classes import check_known
from pipelines.datasets.skipped import ARCHIVE, NOT_AN_IMAGE, SkippedFiles, is_archive, is_ignored, reason_for
from pipelines.datasets.table import ImageTable, PathTable

IMAGE_SUFFIXES = frozenset({"jpeg", "jpg", "png", "webp", "bmp"})
_SCAN_THREADS = 16
_SPLIT_NAMES = ("train", "val", "validation", "test")
_LAYOUT = "It must contain one folder of images per class"


@dataclass(frozen=True)
class ImageFile:
    """Path of an image file relative to the listed folder, and its size in bytes."""

    path: str
    size: int


def index_folder(root: Path, classes: Sequence[str] | None, field: str) -> ImageTable:
    """List the images in the class folders of ``root``, in the same order on every machine.

    Images are in the class folder or in its subfolders (Tiny-ImageNet's ``images/``). Classes and paths are sorted
    by code point. Links are followed. Files that are not images are counted in ``skipped`` of the table; hidden
    files and those of ``is_ignored`` are not.

    Args:
        root: the parent of the class folders.
        classes: the class names in label order, some perhaps without a folder. Default: the folder names; each
            folder must then contain an image.
        field: the config key of ``root``, for messages.

    Raises:
        UserError: ``root`` is missing, not a directory, unreadable, or has no class folders or no images
            (``field``); a folder is not in the class list (``data.classes``).
    """
    skipped = SkippedFiles()
    folders = class_folders(root, field, skipped)
    if classes is not None:
        remedy = "Add the class to data.classes, or move the folder elsewhere."
        check_known(list(folders), classes, root, "data.classes", None, remedy)
    counts = [SkippedFiles() for _ in folders]
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        scans = pool.map(
            lambda name, count: list_images(root, name, field, skipped=count), folders.values(), counts
        )
        images_of = list(scans)
    _check_empty(root, field, dict(zip(folders, images_of, strict=True)), counts, classes is None)
    for count in counts:
        skipped.update(count)
    names = tuple(folders if classes is None else classes)
    label_of = {name: label for label, name in enumerate(names)}
    # Sorted by folder, not by label: the sample order does not depend on data.classes.
    labels = np.repeat([label_of[name] for name in folders], [len(images) for images in images_of])
    files = [image for images in images_of for image in images]
    table = ImageTable.of(root, PathTable.of(i.path for i in files), [i.size for i in files], labels, names)
    return replace(table, skipped=skipped)


def _check_empty(
    root: Path,
    field: str,
    images_of: dict[str, list[ImageFile]],
    counts: list[SkippedFiles],
    each: bool,
) -> None:
    """Refuse folders without any image and, if `each`, a class folder without images."""
    pairs = zip(images_of.items(), counts, strict=True)
    empty = [(name, count) for (name, images), count in pairs if not images]
    skipped = SkippedFiles()
    for _, count in empty:
        skipped.update(count)
    if len(empty) == len(images_of):
        message = f"contains {len(images_of):,} folders but no images{skipped.because()}"
        raise UserError(field, str(root), message, f"{_LAYOUT}, {_suffixes()}.")
    if empty and each:
        remedy = "Move the folder elsewhere, or list every class with data.classes if some have no images."
        more = f" and {len(empty) - 1:,} more" if len(empty) > 1 else ""
        message = f"the class folder {empty[0][0]!r}{more} contains no images{skipped.because()}"
        raise UserError(field, str(root), message, remedy)


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
        check_known(list(class_folders(folder, field)), classes, folder, field, str(val_root or root), remedy)
    table = index_folder(folder, classes, field)
    if split == "train" and folder != root:
        table.skipped.update(_archives_in(root, field))
    return table


def class_folders(root: Path, field: str, skipped: SkippedFiles | None = None) -> dict[str, str]:
    """Classes in ``root`` in order, each with the name of its folder; hidden folders are ignored.

    The class name is the folder name. Bytes that are not UTF-8 are replaced by an escape sequence such as ``\\xe9``.

    Args:
        skipped: counts the images, archives and broken links next to the folders.

    Raises:
        UserError: ``root`` is missing, not a directory, unreadable, or has no folders, or two folders have the same
            class name (``field``).
    """
    skipped = SkippedFiles() if skipped is None else skipped
    entries = sorted(_entries(root, field), key=lambda entry: entry.name)
    folders: dict[str, str] = {}
    for entry in entries:
        if not entry.is_dir():
            _count_outside(entry, skipped)
        elif (name := _class_name(entry.name)) in folders:
            message = f"the folders {entry.name!r} and {folders[name]!r} have the same class name"
            raise UserError(field, str(root), message, "Rename one of them.")
        else:
            folders[name] = entry.name
    if not folders:
        remedy = "Unpack the archive." if ARCHIVE in skipped else f"{_LAYOUT}."
        raise UserError(field, str(root), f"contains no class folders{skipped.because()}", remedy)
    return folders


def _class_name(folder: str) -> str:
    """The name of a folder as text that every file can contain."""
    return folder.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _count_outside(entry: os.DirEntry[str], skipped: SkippedFiles) -> None:
    """Count an entry next to the class folders; other files, such as word lists, are common there."""
    if entry.is_symlink() and not Path(entry.path).exists():
        skipped.add("broken link", entry.name)
    elif is_archive(entry.name):
        skipped.add(ARCHIVE, entry.name)
    elif is_image(entry.name) or reason_for(entry.name) != NOT_AN_IMAGE:
        skipped.add("image outside the class folders", entry.name)


def _archives_in(root: Path, field: str) -> SkippedFiles:
    """The archives in a folder, such as a downloaded one next to ``train``."""
    skipped = SkippedFiles()
    for name in sorted(entry.name for entry in _entries(root, field) if is_archive(entry.name)):
        skipped.add(ARCHIVE, name)
    return skipped


def image_folders(root: Path, limit: int) -> list[str]:
    """The first `limit` folders in ``root``, other than those of splits, with an image in them or one folder below."""
    if not root.is_dir():
        return []
    names = sorted(
        entry.name for entry in _visible(root) if entry.is_dir() and entry.name not in _SPLIT_NAMES
    )
    return list(islice((name for name in names if _has_image(root / name, nested=True)), limit))


def _has_image(folder: Path, nested: bool) -> bool:
    entries = _visible(folder)
    if any(is_image(entry.name) and not entry.is_dir() for entry in entries):
        return True
    return nested and any(_has_image(Path(entry.path), False) for entry in entries if entry.is_dir())


def is_split_folder(folder: Path) -> bool:
    """Whether a folder named ``train`` or ``val`` is a split.

    It is a class if it contains images and no folders, and there are other class folders next to it.
    """
    if not folder.is_dir():
        return False
    entries = _visible(folder)
    may_be_class = any(is_image(entry.name) for entry in entries) and not any(map(_is_dir, entries))
    return not may_be_class or not image_folders(folder.parent, limit=1)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir()


def is_image(name: str) -> bool:
    """Whether a file name has an image suffix, in upper or lower case."""
    _, dot, suffix = name.rpartition(".")
    return bool(dot) and suffix.lower() in IMAGE_SUFFIXES


def list_images(
    root: Path, folder: str, field: str, nested: bool = True, skipped: SkippedFiles | None = None
) -> list[ImageFile]:
    """The images in ``root/folder`` and, if ``nested``, in its direct subfolders, sorted by path.

    Args:
        skipped: counts the other files.

    Raises:
        UserError: a folder is nested too deeply or cannot be read, or a link is broken (``field``).
    """
    images: list[ImageFile] = []
    skipped = SkippedFiles() if skipped is None else skipped
    for entry in sorted(_entries(root / folder, field, skipped), key=lambda entry: entry.name):
        path = f"{folder}/{entry.name}"
        if entry.is_dir():
            if not nested:
                remedy = f"{_LAYOUT}, with at most one folder between the class and its images."
                raise UserError(field, str(root), f"the folder {path} is nested too deeply", remedy)
            images.extend(list_images(root, path, field, nested=False, skipped=skipped))
        elif is_image(entry.name):
            images.append(ImageFile(path, _size(root, path, entry, field)))
        else:
            skipped.add(reason_for(entry.name), path)
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
        return (inner if is_split_folder(inner) else folder), field
    if root.is_dir() and not (root / split).is_dir():
        remedy = (
            "Put the class folders in train/ and val/ of data.root, or set data.root to the training folder and "
            "data.val_root to the validation folder. data.val_fraction=0.1 draws a validation set from class folders."
        )
        raise UserError("data.root", str(root), f"contains no folder {split!r}", remedy)
    # A missing root is reported as root, not as root/train.
    return (root / split if root.is_dir() else root), "data.root"


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder without hidden and ignored ones."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".") and not is_ignored(entry.name)]


def _entries(folder: Path, field: str, skipped: SkippedFiles | None = None) -> list[os.DirEntry[str]]:
    """The entries of a folder without hidden and ignored ones; hidden images are counted in `skipped`."""
    try:
        with os.scandir(folder) as entries:
            result = [entry for entry in entries if not is_ignored(entry.name)]
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else "is not a directory"
        remedy = f"Set {field} to the folder of the images. {_LAYOUT}."
        raise UserError(field, str(folder), problem, remedy) from error
    except OSError as error:
        remedy = "Make the folder and its content readable for the training user."
        raise UserError(field, str(folder), f"cannot be read: {error.strerror or error}", remedy) from error
    if skipped is not None:
        for name in sorted(
            entry.name for entry in result if entry.name.startswith(".") and is_image(entry.name)
        ):
            skipped.add("hidden image", f"{folder.name}/{name}")
    return [entry for entry in result if not entry.name.startswith(".")]


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
