"""Every data set the program knows, behind one function: images in memory or files on disk, with labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from dl2pa.errors import UserError
from pipelines.datasets.arrays import ArrayDataset, Split
from pipelines.datasets.cifar import load_cifar10, load_cifar100
from pipelines.datasets.classes import check_known, check_num_classes, load_classes, nearest
from pipelines.datasets.digits import has_digits, write_digits
from pipelines.datasets.folder import FolderDataset, PathTable, class_folders, index_folder, split_root
from pipelines.datasets.stl10 import load_stl10
from pipelines.datasets.svhn import load_svhn, load_svhn_lt_legacy
from pipelines.datasets.tiny_imagenet import index_tiny_imagenet
from pipelines.longtail import long_tail

__all__ = [
    "ArrayDataset",
    "DatasetName",
    "FolderDataset",
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
) -> ArrayDataset | FolderDataset:
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
    if name == "svhn_lt_legacy" and imbalance is None:
        remedy = (
            "Set data.imbalance=0.01 (published: 0.005, 0.01, 0.02), or data.dataset=svhn for all of SVHN."
        )
        raise UserError("data.imbalance", None, "svhn_lt_legacy is a long-tailed data set", remedy)
    names = load_classes(classes)
    try:
        if split == "val" or imbalance is None:
            return _open(name, root, val_root, names, split)
        if name == "svhn_lt_legacy":
            return _with_own_classes(load_svhn_lt_legacy(root, imbalance), name, names)
        whole = _open(name, root, val_root, names, split)
        return whole.subset(long_tail(whole.labels, whole.classes, imbalance))
    except OSError as error:
        remedy = "Make it readable by the user who trains."
        where = error.filename or root
        raise UserError(
            "data.root", str(where), f"cannot be read: {error.strerror or error}", remedy
        ) from error


def _open(
    name: DatasetName, root: Path, val_root: Path | None, names: tuple[str, ...] | None, split: Split
) -> ArrayDataset | FolderDataset:
    if name in _IN_MEMORY:
        return _with_own_classes(_IN_MEMORY[name](root, split), name, names)
    if name == "tiny_imagenet":
        return index_tiny_imagenet(root, split, names)
    if name == "digits":
        written = root if has_digits(root) else write_digits(root)
        return index_folder(written / split, names, "data.root")
    return _open_imagefolder(root, val_root, names, split)


def _with_own_classes(dataset: ArrayDataset, name: str, classes: tuple[str, ...] | None) -> ArrayDataset:
    if classes is not None and classes != dataset.classes:
        remedy = "Leave it out; the order of the labels is the published one."
        raise UserError(
            "data.classes", list(classes), f"is not the class list of data.dataset={name}", remedy
        )
    return dataset


def _open_imagefolder(
    root: Path, val_root: Path | None, classes: tuple[str, ...] | None, split: Split
) -> FolderDataset:
    folder, field = split_root(root, val_root, split)
    if split == "val" and classes is None:
        classes = tuple(class_folders(*split_root(root, val_root, "train")))
        remedy = "Move the folder away, or list the classes of both halves with data.classes."
        check_known(class_folders(folder, field), classes, folder, field, str(val_root or root), remedy)
    return index_folder(folder, classes, field)
