"""Survey of a folder of images: layout, counts, sizes and unreadable files. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from dl2pa.specs import IMAGE_FOLDER
from pipelines.datasets import ImageTable, Split, open_dataset
from pipelines.datasets.folder import class_folders, is_split_folder
from pipelines.datasets.index import INDEX_NAME, open_index
from pipelines.datasets.pieces import inspect_image
from pipelines.datasets.probe import UNUSABLE, Flag, Probe, describe
from pipelines.datasets.shards import find_shards

FIELD = "DIR"
_VAL_NAMES = ("val", "valid", "validation", "test")
"""Names of validation folders, in order of preference."""
_MAX_INSPECTED = 4096
_THREADS = 16

Progress = Callable[[int, int], None]
"""Called with (done, total) images."""


@dataclass(frozen=True)
class Layout:
    """Values of the keys of section `data` that select the images of both splits."""

    root: Path
    val_root: Path | None = None
    has_val: bool = True


@dataclass(frozen=True)
class Survey:
    """Properties of a data set that decide its recipe.

    Attributes:
        folder: the absolute path of the folder that was looked at.
        val_fraction: for `data.val_fraction`; None if there is a validation folder.
        classes: class names in label order.
        counts: training images of each class, [C].
        short_side: median of the shorter sides of the inspected images, in pixels; None if none is readable.
        num_inspected: inspected images of both splits, evenly spaced.
        unreadable: the unreadable ones, with the reason.
        bad_fractions: of the training and of the validation split, fraction of unreadable images among the inspected
            ones, with one more image than were found.
        num_rotated: inspected images with a camera orientation, which training ignores.
        skipped: files that are not read, as text; empty if there are none.
    """

    folder: Path
    layout: Layout
    val_fraction: float | None
    num_train: int
    num_val: int
    classes: tuple[str, ...]
    counts: NDArray[np.int64]
    short_side: int | None
    num_inspected: int
    unreadable: list[tuple[Path, str]] = field(default_factory=list[tuple[Path, str]])
    bad_fractions: tuple[float, float] = (0.0, 0.0)
    num_rotated: int = 0
    skipped: str = ""

    @property
    def is_long_tailed(self) -> bool:
        """Whether the rarest class has at most a tenth of the images of the most frequent one."""
        return 10 * int(self.counts.min()) <= int(self.counts.max())


def survey(
    folder: Path, val_fraction: float | None = None, progress: Progress = lambda done, total: None
) -> Survey:
    """Look at class folders, `train` and `val` folders of them, or indexed tar shards.

    Args:
        val_fraction: used if there is no validation folder. Default: by the number of images.

    Raises:
        UserError: the folder contains no such images.
    """
    folder = normalized(folder)
    layout = find_layout(folder)
    if layout.has_val:
        if val_fraction is not None:
            remedy = f"Leave it out, or give {folder}/train."
            message = f"is not used: {folder} has a validation folder"
            raise UserError("--val-fraction", val_fraction, message, remedy)
        train, val = (_open(layout, split, None) for split in ("train", "val"))
    else:
        whole = _open(Layout(layout.root, layout.root), "train", None)
        _check_classes(whole, folder)
        val_fraction = val_fraction or default_fraction(len(whole))
        train, val = (_open(layout, split, val_fraction) for split in ("train", "val"))
    _check_classes(train, folder)
    skipped = train.skipped
    skipped.update(val.skipped)
    inspected = list(_inspect([train, val], progress))
    usable = [min(one.height, one.width) for _, _, one in inspected if not one.flags & UNUSABLE]
    return Survey(
        folder,
        layout,
        val_fraction,
        len(train),
        len(val),
        train.classes,
        np.bincount(train.labels, minlength=len(train.classes)),
        int(np.median(usable)) if usable else None,
        len(inspected),
        [
            (table.path(i), describe(table, i, Flag(one.flags & UNUSABLE), read=True))
            for table, i, one in inspected
            if one.flags & UNUSABLE
        ],
        (_bad_fraction(train, inspected), _bad_fraction(val, inspected)),
        sum(bool(one.flags & Flag.ROTATED) for _, _, one in inspected),
        str(skipped) if skipped.total else "",
    )


def _bad_fraction(split: ImageTable, inspected: list[tuple[ImageTable, int, Probe]]) -> float:
    bad = [bool(one.flags & UNUSABLE) for table, _, one in inspected if table is split]
    return (1 + sum(bad)) / max(1, len(bad))


def normalized(folder: Path) -> Path:
    """The absolute path without `..`; links stay."""
    return Path(os.path.normpath(folder.absolute()))


def find_layout(folder: Path) -> Layout:
    """The splits in a folder.

    Raises:
        UserError: there are no class folders, or a validation folder without a training folder.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        splits = open_index(index, folder).splits
        return Layout(folder, has_val="val" in splits)
    if shards := find_shards(folder):
        return Layout(folder, has_val="val" in shards)
    class_folders(folder, FIELD)
    val_names = [name for name in _VAL_NAMES if is_split_folder(folder / name)]
    if not is_split_folder(folder / "train"):
        if val_names:
            message = f"contains the folder {val_names[0]!r} but no folder 'train'"
            remedy = (
                "Put the class folders of the training images in train/, or give a folder of class folders."
            )
            raise UserError(FIELD, str(folder), message, remedy)
        return Layout(folder, has_val=False)
    if not val_names or val_names[0] == "val":
        return Layout(folder, has_val=bool(val_names))
    return Layout(folder / "train", folder / val_names[0])


def default_fraction(count: int) -> float:
    """Fraction of `count` images for validation: more of few images, whose accuracy is else mostly noise."""
    return 0.2 if count < 2000 else 0.1 if count < 100_000 else 0.05


def _check_classes(table: ImageTable, folder: Path) -> None:
    if len(table.classes) < 2:
        remedy = "Give a folder with one folder of images for each of at least two classes."
        raise UserError(FIELD, str(folder), "contains one class folder only", remedy)


def _open(layout: Layout, split: Split, val_fraction: float | None) -> ImageTable:
    try:
        table = open_dataset(
            IMAGE_FOLDER, layout.root, layout.val_root, None, split, val_fraction=val_fraction
        )
    except UserError as error:
        fields = {"data.root": FIELD, "data.val_root": FIELD, "data.val_fraction": "--val-fraction"}
        raise UserError(
            fields.get(error.field, error.field), error.value, error.message, error.remedy
        ) from None
    assert isinstance(table, ImageTable)
    return table


def _inspect(tables: list[ImageTable], progress: Progress) -> Iterator[tuple[ImageTable, int, Probe]]:
    """Table, position and properties of evenly spaced images of all tables."""
    total = sum(len(table) for table in tables)
    step = -(-total // _MAX_INSPECTED)
    places = [(table, i) for table in tables for i in range(0, len(table), step)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for done, (place, one) in enumerate(
            zip(places, pool.map(lambda place: _probe(*place), places), strict=True), start=1
        ):
            progress(done, len(places))
            yield *place, one


def _probe(table: ImageTable, i: int) -> Probe:
    if table.members is None:
        return inspect_image(table.path(i), table.lengths.item(i), decode=False)
    height, width = (0, 0) if table.sizes is None else table.sizes[i].tolist()  # from the index of the shards
    return Probe(height, width, 0 if height else int(Flag.UNREADABLE))
