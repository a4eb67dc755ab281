"""Every data set the program knows, behind one function: images in memory or files on disk, with labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from dl2pa.errors import UserError
from pipelines.datasets.arrays import ArrayDataset, Split
from pipelines.datasets.cifar import load_cifar10, load_cifar100
from pipelines.datasets.classes import check_num_classes, load_classes, nearest
from pipelines.datasets.digits import has_digits, write_digits
from pipelines.datasets.folder import class_folders, index_folder, open_folders, split_root
from pipelines.datasets.index import INDEX_NAME, Index, SplitIndex, open_index, with_classes
from pipelines.datasets.shards import find_shards
from pipelines.datasets.stl10 import load_stl10
from pipelines.datasets.svhn import load_svhn, load_svhn_lt_legacy
from pipelines.datasets.table import ImageTable, PathTable
from pipelines.datasets.tiny_imagenet import index_tiny_imagenet
from pipelines.longtail import long_tail

__all__ = [
    "ArrayDataset",
    "DatasetName",
    "ImageTable",
    "PathTable",
    "Split",
    "check_num_classes",
    "index_folder",
    "load_classes",
    "open_dataset",
    "write_digits",
]

DatasetName = Literal[
    "imagefolder", "tiny_imagenet", "cifar10", "cifar100", "svhn", "svhn_lt_legacy", "stl10", "digits"
]

_IN_MEMORY: dict[str, Callable[[Path, Split], ArrayDataset]] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "svhn": load_svhn,
    "svhn_lt_legacy": load_svhn,
    "stl10": load_stl10,
}


def open_dataset(
    name: DatasetName,
    root: Path | None,
    val_root: Path | None,
    classes: str | Path | Sequence[str] | None,
    split: Split,
    imbalance: float | None = None,
    index: Path | None = None,
) -> ArrayDataset | ImageTable:
    """Open one half of a data set; both halves have the same classes in the same order.

    Args:
        name: ``data.dataset``.
        root: ``data.root``: where the data set lies; ``digits`` is written there if it is not there yet.
        val_root: ``data.val_root``: for ``imagefolder`` only, where validation has a folder of its own
            (see ``folder.split_root``).
        classes: ``data.classes``: a file or a list that fixes the order of the labels and may name classes
            without images (see ``load_classes``); None takes the data set's own, for ``imagefolder`` the
            folders of the training half.
        split: which half.
        imbalance: ``data.imbalance``: the training half is made long-tailed (see ``long_tail``), validation
            stays whole; None leaves both as they are.
        index: ``data.index``: the index of `root`, for ``imagefolder``; None takes the one in `root`, if any.

    Raises:
        UserError: naming the config key, its value and what to do.
    """
    if name not in get_args(DatasetName):
        known = ", ".join(get_args(DatasetName))
        raise UserError(
            "data.dataset", name, f"is not a data set{nearest(name, get_args(DatasetName))}", f"Use {known}."
        )
    if root is None:
        remedy = "Set data.root=DIR or the environment variable DL2PA_DATA."
        raise UserError("data.root", None, "is not set", remedy)
    if val_root is not None and name != "imagefolder":
        remedy = "Leave it out: this data set brings its validation half with it."
        raise UserError("data.val_root", str(val_root), f"is not used by data.dataset={name}", remedy)
    if index is not None and name != "imagefolder":
        remedy = "Leave it out: only image folders and tar shards have an index."
        raise UserError("data.index", str(index), f"is not used by data.dataset={name}", remedy)
    if name == "svhn_lt_legacy" and imbalance is None:
        remedy = (
            "Set data.imbalance=0.01 (published: 0.005, 0.01, 0.02), or data.dataset=svhn for all of SVHN."
        )
        raise UserError("data.imbalance", None, "svhn_lt_legacy is a long-tailed data set", remedy)
    names = load_classes(classes)
    try:
        if split == "val" or imbalance is None:
            return _open(name, root, val_root, names, split, index)
        if name == "svhn_lt_legacy":
            return _with_own_classes(load_svhn_lt_legacy(root, imbalance), name, names)
        whole = _open(name, root, val_root, names, split, index)
        return whole.subset(long_tail(whole.labels, whole.classes, imbalance))
    except OSError as error:
        remedy = "Make it readable by the user who trains."
        where = error.filename or root
        raise UserError(
            "data.root", str(where), f"cannot be read: {error.strerror or error}", remedy
        ) from error


def _open(
    name: DatasetName,
    root: Path,
    val_root: Path | None,
    names: tuple[str, ...] | None,
    split: Split,
    index: Path | None,
) -> ArrayDataset | ImageTable:
    if name in _IN_MEMORY:
        return _with_own_classes(_IN_MEMORY[name](root, split), name, names)
    if name == "tiny_imagenet":
        return index_tiny_imagenet(root, split, names)
    if name == "digits":
        written = root if has_digits(root) else write_digits(root)
        return index_folder(written / split, names, "data.root")
    return _open_imagefolder(root, val_root, names, split, index)


def _with_own_classes(dataset: ArrayDataset, name: str, classes: tuple[str, ...] | None) -> ArrayDataset:
    if classes is not None and classes != dataset.classes:
        remedy = "Leave it out; the order of the labels is the published one."
        raise UserError(
            "data.classes", list(classes), f"is not the class list of data.dataset={name}", remedy
        )
    return dataset


def _open_imagefolder(
    root: Path, val_root: Path | None, classes: tuple[str, ...] | None, split: Split, index: Path | None
) -> ImageTable:
    """From the index of the folder that holds the half where there is one; else by listing it."""
    base = val_root if split == "val" and val_root is not None else root
    found = _indexed(base, index if base is root else None)
    if found is None and find_shards(base):
        remedy = f"Write their index: dl2pa data index {base}"
        raise UserError("data.root", str(base), "holds tar shards without an index", remedy)
    learned = None
    if base is not root and classes is None:  # the labels are those of training
        own = _indexed(root, index)
        learned = None if own is None else _split_of(*own, "train", True).table.classes
    if found is None:
        return open_folders(root, val_root, classes, split, learned)
    if base is not root and classes is None and learned is None:
        learned = tuple(class_folders(*split_root(root, val_root, "train")))
    table = _split_of(*found, split, val_root is not None).table
    return with_classes(table, classes or learned, found[1])


def _indexed(root: Path, given: Path | None) -> tuple[Index, Path] | None:
    """The index named, or else the one that lies in the folder."""
    file = given or root / INDEX_NAME
    return (open_index(file, root), file) if given or file.is_file() else None


def _split_of(index: Index, file: Path, split: Split, alone: bool) -> SplitIndex:
    """A half by its name; where each half has a folder of its own, that folder's bare class folders are it."""
    found = index.splits.get(split) or (index.splits.get("all") if alone else None)
    if found is None:
        has = " and ".join(repr(name) for name in index.splits)
        remedy = "Index a folder with train/ and val/, or set data.val_root to a folder for validation."
        raise UserError("data.index", str(file), f"has no split {split!r}, only {has}", remedy)
    return found
