"""Tiny-ImageNet in its official layout: validation images in one folder, their labels in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dl2pa.errors import UserError
from pipelines.datasets.arrays import Split, damaged, read_text, require, subfolder
from pipelines.datasets.classes import check_known, load_classes
from pipelines.datasets.folder import index_folder, list_images
from pipelines.datasets.table import ImageTable, PathTable

_ARCHIVE = "tiny-imagenet-200.zip, the official archive"


def index_tiny_imagenet(root: Path, split: Split, classes: Sequence[str] | None = None) -> ImageTable:
    """Tiny-ImageNet: 100,000 training and 10,000 validation images of 64×64 pixels, 200 classes.

    Args:
        root: the folder that contains ``tiny-imagenet-200``, or that folder.
        split: ``train`` or ``val``.
        classes: the wnids in label order. Default: the sorted wnids of ``wnids.txt``, which gives the same labels
            as reading ``train`` as an image folder.

    Raises:
        UserError: a file or folder is missing, or files and labels do not match (``data.root``); a class is not in
            ``classes`` (``data.classes``).
    """
    folder = subfolder(root, "tiny-imagenet-200", _ARCHIVE)
    if classes is None:
        wnids = load_classes(require(root, folder / "wnids.txt", _ARCHIVE))
        classes = sorted(wnids or ())
    if split == "train":
        return index_folder(folder / "train", classes, "data.root")
    return _index_val(root, folder / "val", tuple(classes))


def _index_val(root: Path, folder: Path, classes: tuple[str, ...]) -> ImageTable:
    annotations = require(root, folder / "val_annotations.txt", _ARCHIVE)
    wnid_of = _read_annotations(annotations)
    remedy = "Add the class to data.classes."
    check_known(sorted(set(wnid_of.values())), classes, annotations, "data.classes", None, remedy)
    images = list_images(folder, "images", "data.root", nested=False)
    names = [image.path.removeprefix("images/") for image in images]
    if differing := sorted(set(names) ^ wnid_of.keys()):
        problem = "has no label" if differing[0] in names else "does not exist"
        raise damaged(annotations, f"the image {differing[0]} {problem} ({len(differing):,} such names)")
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of[wnid_of[name]] for name in names]
    return ImageTable.of(
        folder,
        PathTable.of(image.path for image in images),
        [image.size for image in images],
        labels,
        classes,
    )


def _read_annotations(path: Path) -> dict[str, str]:
    """The wnid of each image, from tab-separated lines ``val_0.JPEG wnid x y width height``."""
    wnid_of: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if len(words) < 2:
            problem = f"line {number} is {line!r}, not an image and its wnid"
            raise UserError("data.root", str(path), problem, f"Unpack {_ARCHIVE} again.")
        wnid_of[words[0]] = words[1]
    return wnid_of
