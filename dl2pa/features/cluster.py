"""Split each class of a feature data set into clusters, which gives many classes of real features."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from dl2pa.features.join import Block, join_again
from dl2pa.osutil import replacing
from pipelines.datasets.arrays import Split
from pipelines.datasets.features import FeatureDataset, FeatureFolder, check_digest, load_features

Floats = NDArray[np.float64]
_ITERATIONS = 30


def cluster_features(root: Path, out: Path, clusters: int) -> dict[str, Any]:
    """Write the features in `root` with C · `clusters` classes to the folder `out`; returns the record.

    Class k of C becomes the classes k · clusters, …, the clusters of a k-means of its training features. Validation
    features belong to the nearest center of their class.

    Raises:
        UserError: the features are damaged, a class has too few different ones, or `out` is not an empty folder.
    """
    source, folder = FeatureFolder(root), FeatureFolder(out)
    record = source.read_complete()
    if out.exists() and any(out.iterdir()):
        raise UserError("--out", str(out), "is not empty", "Give a new folder.")
    began = time.monotonic()
    splits = {split: load_features(root, split) for split in ("train", "val")}
    check_count(clusters, splits["train"])
    check_digest(source.backbone, record["network"]["sha256"])
    labels = _cluster_labels(splits["train"], splits["val"], clusters)
    folder.root.mkdir(parents=True, exist_ok=True)
    for old, new in ((source.backbone, folder.backbone), (source.pca, folder.pca)):
        if old.is_file():
            with replacing(new) as temporary:
                shutil.copyfile(old, temporary)
    record["classes"] = [f"{name}/{i}" for name in record["classes"] for i in range(clusters)]
    record["identity"] = {**record["identity"], "--clusters": clusters}

    def blocks(split: Split) -> Iterator[Block]:
        yield splits[split].features, labels[split]

    return join_again(folder, blocks, record, None, began)


def check_count(clusters: int, train: FeatureDataset) -> None:
    """Check that no cluster of a class would be empty: equal features are in one cluster.

    Raises:
        UserError: names ``--clusters``.
    """
    different = [len(np.unique(train.features[train.labels == k], axis=0)) for k in range(len(train.classes))]
    fewest = min(different)
    if fewest < 2:
        name = train.classes[different.index(fewest)]
        message = f"is not possible: the class {name!r} has {fewest} different training features"
        raise UserError("--clusters", clusters, message, "Write the features without this class.")
    if not 2 <= clusters <= fewest:
        message = f"must be from 2 to {fewest}, the smallest number of different training features of a class"
        raise UserError("--clusters", clusters, message, "Give another number.")


def _cluster_labels(
    train: FeatureDataset, val: FeatureDataset, clusters: int
) -> dict[Split, NDArray[np.int64]]:
    """New labels of both splits."""
    labels: dict[Split, NDArray[np.int64]] = {
        "train": np.zeros_like(train.labels),
        "val": np.zeros_like(val.labels),
    }
    for k in range(len(train.classes)):
        members = np.flatnonzero(train.labels == k)
        rows = train.features[members].astype(np.float64)
        centers = k_means(rows, clusters, seed=k)
        labels["train"][members] = k * clusters + _nearest(rows, centers)
        members = np.flatnonzero(val.labels == k)
        labels["val"][members] = k * clusters + _nearest(val.features[members].astype(np.float64), centers)
    return labels


def k_means(rows_nd: Floats, count: int, seed: int) -> Floats:
    """Centers [count, d] of Lloyd's algorithm from centers drawn by k-means++.

    Args:
        rows_nd: at least `count` rows; with as many different ones, no cluster is empty.
    """
    generator = np.random.default_rng(seed)
    centers = rows_nd[generator.integers(len(rows_nd), size=1)]
    while len(centers) < count:
        distances = _distances(rows_nd, centers).min(axis=1)
        total = distances.sum()
        shares = distances / total if total > 0 else np.full(len(rows_nd), 1 / len(rows_nd))
        centers = np.concatenate([centers, rows_nd[generator.choice(len(rows_nd), size=1, p=shares)]])
    for _ in range(_ITERATIONS):
        distances = _distances(rows_nd, centers)
        nearest = distances.argmin(axis=1)
        far = distances.min(axis=1)
        for j in range(count):
            members = nearest == j
            if members.any():
                centers[j] = rows_nd[members].mean(axis=0)
            else:
                centers[j] = rows_nd[far.argmax()]
                far[far.argmax()] = 0.0
    return centers


def _nearest(rows_nd: Floats, centers_kd: Floats) -> NDArray[np.int64]:
    return _distances(rows_nd, centers_kd).argmin(axis=1)


def _distances(rows_nd: Floats, centers_kd: Floats) -> Floats:
    squares = np.square(rows_nd).sum(axis=1)[:, None] + np.square(centers_kd).sum(axis=1)
    return np.maximum(squares - 2.0 * rows_nd @ centers_kd.T, 0.0)
