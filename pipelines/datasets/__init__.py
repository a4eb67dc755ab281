"""Open any supported data set: arrays in memory or image files on disk, with labels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import TypeVar

from dl2pa.errors import UserError
from pipelines.datasets.arrays import ArrayDataset, Split
from pipelines.datasets.classes import ClassList, check_num_classes, load_classes, nearest
from pipelines.datasets.digits import has_digits, write_digits
from pipelines.datasets.features import FeatureDataset
from pipelines.datasets.folder import (
    class_folders,
    index_folder,
    is_split_folder,
    open_folders,
    split_root,
)
from pipelines.datasets.holdout import FIELD as VAL_FRACTION
from pipelines.datasets.holdout import draw_split
from pipelines.datasets.index import INDEX_NAME, Index, SplitIndex, open_index, with_classes
from pipelines.datasets.own import open_own
from pipelines.datasets.parquet import find_parquet
from pipelines.datasets.shards import check_verified, find_shards
from pipelines.datasets.table import ImageTable, PathTable
from pipelines.longtail import long_tail
from pipelines.names import DATASETS, IMAGE_FOLDER, is_own
from pipelines.remote.address import RemotePath

__all__ = [
    "ArrayDataset",
    "FeatureDataset",
    "ImageTable",
    "PathTable",
    "Split",
    "check_num_classes",
    "has_digits",
    "index_folder",
    "load_classes",
    "open_dataset",
    "refuse_without_index",
    "write_digits",
]

T = TypeVar("T", ArrayDataset, FeatureDataset)


def open_dataset(
    name: str,
    root: Path | None,
    val_root: Path | None,
    classes: str | Path | Sequence[str] | None,
    split: Split,
    imbalance: float | None = None,
    index: Path | None = None,
    val_fraction: float | None = None,
) -> ArrayDataset | ImageTable | FeatureDataset:
    """Open one split of a data set; both splits have the same classes in the same order.

    Args:
        name: ``data.dataset``.
        root: ``data.root``: the folder of the data set; ``digits`` is created there if missing.
        val_root: ``data.val_root``: separate validation folder, for ``imagefolder`` only (see
            ``folder.split_root``).
        classes: ``data.classes``: a file or a list of the classes in label order, some perhaps without images
            (see ``load_classes``). Default: the classes of the data set, for ``imagefolder`` the folders of the
            training split.
        split: ``train`` or ``val``.
        imbalance: ``data.imbalance``: makes the training split long-tailed (see ``long_tail``).
        index: ``data.index``: the index of `root`, for ``imagefolder``. Default: the index in `root`, if any.
        val_fraction: ``data.val_fraction``: draws the validation split from the class folders, for ``imagefolder``
            without `val_root`, or from the training split, for arrays and features (see ``holdout``).

    Raises:
        UserError: a config value is invalid, or the data set cannot be read.
    """
    known = [key for key, row in DATASETS.items() if row.layout != "generated"]
    if is_own(name):
        return _open_own(name, root, val_root, index, classes, split, imbalance)
    if name not in known:
        message = f"is not a known data set{nearest(name, known)}"
        raise UserError("data.dataset", name, message, f"Use {', '.join(known)}.")
    long_tailed = DATASETS[name].long_tail
    if root is None:
        remedy = "Set data.root=DIR or the environment variable DL2PA_DATA."
        raise UserError("data.root", None, "is not set", remedy)
    if val_root is not None and name != IMAGE_FOLDER:
        remedy = "Leave it out: this data set includes its validation split."
        raise UserError("data.val_root", str(val_root), f"is not used by data.dataset={name}", remedy)
    if index is not None and name != IMAGE_FOLDER:
        remedy = "Leave it out: only image folders and tar shards use an index."
        raise UserError("data.index", str(index), f"is not used by data.dataset={name}", remedy)
    if long_tailed and imbalance is None:
        opener = DATASETS[name].opener
        full = next(key for key in known if DATASETS[key].opener == opener and not DATASETS[key].long_tail)
        remedy = (
            f"Set data.imbalance=0.01 (published: 0.005, 0.01, 0.02), or data.dataset={full} for all images."
        )
        raise UserError("data.imbalance", None, f"is not set, but {name} is a long-tailed data set", remedy)
    class_list = None if classes is None else ClassList.load(classes)
    try:
        if val_fraction is not None:
            part = _open_part(name, root, class_list, split, index, val_fraction)
            if split == "val" or imbalance is None:
                return part
            return part.subset(long_tail(part.labels, part.classes, imbalance))
        if split == "val" or imbalance is None:
            return _open(name, root, val_root, class_list, split, index)
        if long_tailed:
            return _check_classes(resolve_name(long_tailed)(root, imbalance), name, class_list)
        full_split = _open(name, root, val_root, class_list, split, index)
        return full_split.subset(long_tail(full_split.labels, full_split.classes, imbalance))
    except OSError as error:
        remedy = "Make it readable for the training user."
        path, problem = str(error.filename or root), f"cannot be read: {error.strerror or error}"
        raise UserError("data.root", path, problem, remedy) from error


def _open_own(
    name: str,
    root: Path | None,
    val_root: Path | None,
    index: Path | None,
    classes: str | Path | Sequence[str] | None,
    split: Split,
    imbalance: float | None,
) -> ImageTable:
    """Open a split of a user's function; keys that it replaces are refused."""
    for field, value in (("data.val_root", val_root), ("data.index", index), ("data.classes", classes)):
        if value is not None:
            remedy = "Leave it out: the function returns the samples of each split and the class names."
            raise UserError(field, str(value), f"is not used by data.dataset={name}", remedy)
    table = open_own(name, root, split)
    if split == "val" or imbalance is None:
        return table
    return table.subset(long_tail(table.labels, table.classes, imbalance))


def _open(
    name: str,
    root: Path,
    val_root: Path | None,
    classes: ClassList | None,
    split: Split,
    index: Path | None,
) -> ArrayDataset | ImageTable | FeatureDataset:
    spec = DATASETS[name]
    if spec.opener is None:
        return _open_imagefolder(root, val_root, classes, split, index)
    opener = resolve_name(spec.opener)
    if spec.layout in ("arrays", "features"):
        return _check_classes(opener(root, split), name, classes)
    return opener(root, split, None if classes is None else classes.names())


def _check_classes(dataset: T, name: str, classes: ClassList | None) -> T:
    names = None if classes is None else classes.names(lambda: dataset.classes)
    if names is not None and names != dataset.classes:
        remedy = "Leave it out: the classes and their order are fixed."
        raise UserError("data.classes", list(names), f"is not the class list of data.dataset={name}", remedy)
    return dataset


def _open_imagefolder(
    root: Path, val_root: Path | None, class_list: ClassList | None, split: Split, index: Path | None
) -> ImageTable:
    """Open a split from the index of its folder, else by listing the folder."""
    base, field = root, "data.root"
    if split == "val" and val_root is not None:
        base, field = val_root, "data.val_root"
    separate = field == "data.val_root"
    if not isinstance(base, RemotePath):
        check_verified(base, field)
    indexed = _open_index(base, None if separate else index, field)
    if indexed is None:
        refuse_without_index(base, field)
    classes = None
    if class_list is not None:
        classes = class_list.names(lambda: _classes_in_data(root, val_root, index))
    train_classes = None
    if separate and classes is None:  # validation labels are those of training
        train_index = _open_index(root, index)
        train_classes = None if train_index is None else _split_of(*train_index, "train", True).table.classes
    if indexed is None:
        return open_folders(root, val_root, classes, split, train_classes)
    if separate and classes is None and train_classes is None:
        train_classes = tuple(class_folders(*split_root(root, val_root, "train")))
    table = _split_of(*indexed, split, val_root is not None).table
    if len(table) == 0:
        message = f"its split {split!r} contains no images{table.skipped.because()}"
        raise UserError("data.index", str(indexed[1]), message, "Add images, and index the folder again.")
    return with_classes(table, classes or train_classes, indexed[1])


def _open_part(
    name: str,
    root: Path,
    class_list: ClassList | None,
    split: Split,
    index: Path | None,
    val_fraction: float,
) -> ArrayDataset | ImageTable | FeatureDataset:
    """Draw a split from the class folders in `root`, or in its folder ``train``; of arrays and features, from the
    training split."""
    if name != IMAGE_FOLDER:
        return draw_split(_open(name, root, None, class_list, "train", None), val_fraction, split)
    indexed = _open_index(root, index)
    if is_split_folder(root / "val") if indexed is None else "val" in indexed[0].splits:
        remedy = "Remove data.val_fraction, or set data.root to the training folder."
        raise UserError(VAL_FRACTION, val_fraction, f"{root} already has a validation folder", remedy)
    # With a val_root, data.root may contain the class folders itself.
    whole = _open_imagefolder(root, root, class_list, "train", index)
    return draw_split(whole, val_fraction, split)


def refuse_without_index(base: Path, field: str) -> None:
    """Refuse a folder of tar shards or Parquet files, which are read through an index."""
    kind = "tar shards" if find_shards(base) else "Parquet files" if find_parquet(base).splits else None
    if kind is not None:
        remedy = f"Create their index with `dl2pa data index {base}`."
        raise UserError(field, str(base), f"contains {kind} without an index", remedy)


def _classes_in_data(root: Path, val_root: Path | None, index: Path | None) -> set[str]:
    """Class names of both splits, as far as they can be listed."""
    names: set[str] = set()
    for base, file in ((root, index), (val_root, None)):
        indexed = None if base is None else _open_index(base, file)
        names.update(indexed[0].classes if indexed is not None else ())
    for split in ("train", "val"):
        with suppress(UserError, NotImplementedError):
            names.update(class_folders(*split_root(root, val_root, split)))
    return names


def _open_index(root: Path, index: Path | None, field: str = "data.root") -> tuple[Index, Path] | None:
    """The given index, else the index in `root`, with its file; None if there is none."""
    if isinstance(root, RemotePath):
        from pipelines.remote.open import open_remote_index

        return open_remote_index(root, index, field)
    if isinstance(index, RemotePath):
        remedy = "Set data.index to a file, or data.root to the folder of the shards in object storage."
        raise UserError("data.index", str(index), "is in object storage, but data.root is not", remedy)
    file = index or root / INDEX_NAME
    return (open_index(file, root), file) if index or file.is_file() else None


def _split_of(index: Index, file: Path, split: Split, separate: bool) -> SplitIndex:
    """A split of an index; if the splits are in separate folders, also an index of bare class folders."""
    content = index.splits.get(split) or (index.splits.get("all") if separate else None)
    if content is None:
        names = " and ".join(repr(name) for name in index.splits)
        remedy = (
            "Index a folder with train/ and val/, set data.val_root to a folder for validation, "
            "or set data.val_fraction=0.1."
        )
        if index.source is not None and "--list" in index.source.options:
            remedy = "Index the lists of both splits: `dl2pa data index ROOT --list FILE --val-list FILE`."
        raise UserError("data.index", str(file), f"has no split {split!r}, only {names}", remedy)
    return content
