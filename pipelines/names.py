"""Table of the data sets: one row each. Imports nothing, so that the configuration can read it without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DatasetSpec:
    """Properties of one value of `data.dataset`.

    Attributes:
        layout: `arrays` in memory, image `files` on disk, `features` of a frozen network, or `generated` batches.
        loader: `data.loader` chosen by `auto`.
        opener: `module:function`; arrays and features: (root, split); files: (root, split, classes); None: an image
            folder or no files at all.
        long_tail: `module:function` of a published long-tailed training split, (root, imbalance).
        needs_root: whether the user must set `data.root`.
    """

    layout: Literal["arrays", "files", "features", "generated"]
    loader: Literal["dali", "resident", "synthetic"]
    opener: str | None = None
    long_tail: str | None = None
    needs_root: bool = True


_OWN = DatasetSpec("files", "dali", needs_root=False)
_OWN_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
OWN_PATTERN = f"^{_OWN_NAME.pattern}$"
"""Regular expression of `package.module:function`."""

REMOTE = "s3://"
"""Beginning of an address in object storage."""

IMAGE_FOLDER = "imagefolder"
CIFAR100 = "cifar100"
FEATURES = "features"
SYNTHETIC = "synthetic"

DATASETS = {
    IMAGE_FOLDER: DatasetSpec("files", "dali"),
    "tiny_imagenet": DatasetSpec("files", "dali", "pipelines.datasets.tiny_imagenet:index_tiny_imagenet"),
    "cifar10": DatasetSpec("arrays", "resident", "pipelines.datasets.cifar:load_cifar10"),
    CIFAR100: DatasetSpec("arrays", "resident", "pipelines.datasets.cifar:load_cifar100"),
    "svhn": DatasetSpec("arrays", "resident", "pipelines.datasets.svhn:load_svhn"),
    # The authors' long-tailed SVHN: a third of its training labels is wrong.
    "svhn_lt_legacy": DatasetSpec(
        "arrays",
        "resident",
        "pipelines.datasets.svhn:load_svhn",
        long_tail="pipelines.datasets.svhn:load_svhn_lt_legacy",
    ),
    "stl10": DatasetSpec("arrays", "resident", "pipelines.datasets.stl10:load_stl10"),
    "digits": DatasetSpec("files", "dali", "pipelines.datasets.digits:index_digits", needs_root=False),
    FEATURES: DatasetSpec("features", "resident", "pipelines.datasets.features:load_features"),
    SYNTHETIC: DatasetSpec("generated", "synthetic", needs_root=False),
}


def is_own(name: str) -> bool:
    """Whether a value of `data.dataset` names a user's function, `package.module:function`."""
    return _OWN_NAME.fullmatch(name) is not None


def is_remote(path: str | None) -> bool:
    """Whether a path is an address in object storage."""
    return path is not None and path.startswith(REMOTE)


def dataset_spec(name: str) -> DatasetSpec:
    """The row of a data set; a user's function has one, too."""
    return _OWN if is_own(name) else DATASETS[name]
