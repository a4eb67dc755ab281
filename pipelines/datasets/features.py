"""Data set of feature vectors that a frozen network has computed; `dl2pa features` writes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from dl2pa.osutil import sha256_of
from dl2pa.records import read_record
from pipelines.datasets.arrays import Split, damaged, integers, subset_fingerprint

FORMAT = "dl2pa-features-1"
SPLITS: tuple[Split, ...] = ("train", "val")
_REMEDY = "Write it again with `dl2pa features CONFIG --out DIR`."
_FIELDS: dict[str, type] = {"dim": int, "complete": bool, "splits": dict, "classes": list, "network": dict}


@dataclass(frozen=True, eq=False)
class FeatureDataset:
    """Feature vectors with their labels.

    Attributes:
        features: [N, D], float16 or float32, perhaps memory-mapped.
        labels: [N], indices into ``classes``.
        classes: the class names in label order.
        fingerprint: 16 hexadecimal digits that change with any feature or label.
        root: the folder.
    """

    features: NDArray[Any]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    fingerprint: str
    root: Path

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, samples: NDArray[np.int64], labels: NDArray[np.int64] | None = None) -> FeatureDataset:
        """The features ``samples`` [M] in that order, optionally with other labels [M]."""
        labels = self.labels[samples] if labels is None else labels
        fingerprint = subset_fingerprint(self.fingerprint, samples, labels)
        return FeatureDataset(self.features[samples], labels, self.classes, fingerprint, self.root)


@dataclass(frozen=True)
class FeatureFolder:
    """Files of a feature data set."""

    root: Path

    @property
    def record(self) -> Path:
        """Description of the features, of the network and of the images; written last as complete."""
        return self.root / "features.json"

    @property
    def backbone(self) -> Path:
        """Weights of the frozen network."""
        return self.root / "backbone.safetensors"

    @property
    def pca(self) -> Path:
        """Mean, components and variances of the PCA."""
        return self.root / "pca.safetensors"

    @property
    def parts(self) -> Path:
        """Folder of the features of an unfinished pass."""
        return self.root / "parts"

    @property
    def stop(self) -> Path:
        """Exists from a request to stop until the next pass: the processes end at their next batch."""
        return self.parts / "stop"

    def features(self, split: Split) -> Path:
        return self.root / f"{split}_features.npy"

    def labels(self, split: Split) -> Path:
        return self.root / f"{split}_labels.npy"

    def read_record(self) -> dict[str, Any] | None:
        """Read the record; None if there is none.

        Raises:
            DamagedFile: it is damaged.
        """
        return read_record(self.record, _FIELDS, tuple(_FIELDS), _REMEDY)

    def read_complete(self) -> dict[str, Any]:
        """Read the record of a complete data set.

        Raises:
            UserError: there is none, it is incomplete, or of another version (``data.root``).
        """
        record = self.read_record()
        if record is None:
            problem = "is not a folder that `dl2pa features` wrote"
            raise UserError("data.root", str(self.root), problem, _REMEDY)
        if record.get("format") != FORMAT:
            problem = f"has the format {record.get('format')!r}, not {FORMAT}"
            raise UserError("data.root", str(self.root), problem, _REMEDY)
        if not record["complete"]:
            remedy = "Repeat the `dl2pa features` command that began it; it continues."
            raise UserError("data.root", str(self.root), "is not complete", remedy)
        return record


def load_features(root: Path, split: Split) -> FeatureDataset:
    """Open a split; the features are memory-mapped.

    Raises:
        UserError: a file is missing or differs from its record (``data.root``).
    """
    folder = FeatureFolder(root)
    record = folder.read_complete()
    known = record["splits"].get(split)
    if not isinstance(known, dict):
        raise damaged_features(folder.record, f"it does not describe the split {split!r}")
    classes = tuple(map(str, record["classes"]))
    features = _load(folder.features(split), known.get("features_sha256"))
    labels = integers(
        folder.labels(split), "its labels", _load(folder.labels(split), known.get("labels_sha256"))
    )
    if (
        features.ndim != 2
        or features.dtype.name not in ("float16", "float32")
        or len(features) != len(labels)
    ):
        raise damaged_features(folder.features(split), f"its shape is {features.shape}")
    digest = hashlib.sha256(repr((known["features_sha256"], known["labels_sha256"], classes)).encode())
    return FeatureDataset(features, labels, classes, digest.hexdigest()[:16], root)


def feature_dim(root: Path) -> int:
    """Dimension D of the features in a folder.

    Raises:
        UserError: it is not a complete feature data set.
    """
    return int(FeatureFolder(root).read_complete()["dim"])


def damaged_features(path: Path, why: str) -> UserError:
    """The error for an invalid file of a feature data set."""
    return UserError(damaged(path, why).field, str(path), f"cannot be used: {why}", _REMEDY)


def check_digest(path: Path, expected: object) -> None:
    """Check that a file has the recorded SHA-256.

    Raises:
        UserError: it is missing, or its content has changed (``data.root``).
    """
    if not path.is_file():
        raise damaged_features(path, "it does not exist")
    if sha256_of(path) != expected:
        raise damaged_features(path, "its content differs from its recorded hash")


def _load(path: Path, digest: object) -> NDArray[Any]:
    check_digest(path, digest)
    try:
        # Copy on write: the pages are shared between processes, and torch accepts the array.
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError as error:
        raise damaged_features(path, str(error)) from None
