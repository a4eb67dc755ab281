"""Join blocks of features to the arrays of a feature data set, projected by a PCA of the training features."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from dl2pa.features.pca import Pca, fit_pca
from dl2pa.osutil import replacing, sha256_of, write_json
from pipelines.datasets.arrays import Split
from pipelines.datasets.features import SPLITS, FeatureFolder

Block = tuple[NDArray[Any], NDArray[np.int64]]
"""Features [n, D] and labels [n]."""
Source = Callable[[Split], Iterator[Block]]
"""Yields the blocks of a split, in order."""


def join(folder: FeatureFolder, source: Source, record: dict[str, Any], pca: int | None) -> None:
    """Write the features and labels of both splits, and complete the entries `splits` and `network` of the record.

    Args:
        record: `dim`, `dtype` and `network` are set.
        pca: number of principal components; None keeps the features as they are.

    Raises:
        UserError: a feature is not finite or exceeds the range of the stored numbers, or a split is empty.
    """
    projection: Pca | None = None
    if pca is not None:
        projection = fit_pca((features for features, _ in source("train")), pca)
        record["network"]["pca"] = _write_pca(folder, projection)
    record["splits"] = {split: _join_split(folder, split, source, projection, record) for split in SPLITS}
    network = record["network"]
    digest = hashlib.sha256(json.dumps([network["sha256"], network["pca"]], sort_keys=True).encode())
    network["digest"] = digest.hexdigest()[:16]


def join_again(
    folder: FeatureFolder, source: Source, record: dict[str, Any], pca: int | None, began: float
) -> dict[str, Any]:
    """Join blocks of an existing feature data set and write its record, which keeps the numbers of skipped images.

    Args:
        record: as for `join`, with the `splits` of the existing data set.
        began: `time.monotonic()` at the start of the command.

    Returns:
        The record.

    Raises:
        UserError: as for `join`.
    """
    skipped = {split: known["skipped"] for split, known in record["splits"].items()}
    join(folder, source, record, pca)
    for split, known in record["splits"].items():
        known["skipped"] = skipped[split]
    images = sum(known["images"] for known in record["splits"].values())
    seconds = time.monotonic() - began
    record |= {"seconds": seconds, "images_per_second": images / seconds}
    write_json(folder.record, record, indent=1)
    return record


def _join_split(
    folder: FeatureFolder, split: Split, source: Source, projection: Pca | None, record: dict[str, Any]
) -> dict[str, Any]:
    labels = np.concatenate([part for _, part in source(split)])
    if not len(labels):
        raise UserError("data.root", str(folder.root), "no image could be read", "Repair the data set.")
    kind, shape = np.dtype(record["dtype"]), (len(labels), int(record["dim"]))
    with replacing(folder.features(split), kind.itemsize * shape[0] * shape[1]) as temporary:
        target = np.lib.format.open_memmap(temporary, mode="w+", dtype=kind, shape=shape)
        start = 0
        for features, _ in source(split):
            values = features if projection is None else projection.project(features)
            _check_range(values, kind)
            target[start : start + len(values)] = values
            start += len(values)
        target.flush()
        del target
    with replacing(folder.labels(split)) as temporary:
        np.save(temporary, labels)
    return {
        "images": len(labels),
        "features_sha256": sha256_of(folder.features(split)),
        "labels_sha256": sha256_of(folder.labels(split)),
    }


def _check_range(values: NDArray[Any], kind: np.dtype[Any]) -> None:
    largest = float(np.abs(values).max(initial=0))
    if not np.isfinite(largest):
        remedy = "Check model.init, or set train.precision=fp32, and give another --out."
        raise UserError("model.init", largest, "gives features that are not finite", remedy)
    if largest > float(np.finfo(kind).max):
        message = f"cannot hold features as large as {largest:.3g}"
        raise UserError("--dtype", kind.name, message, "Use --dtype float32, and another --out.")


def _write_pca(folder: FeatureFolder, pca: Pca) -> dict[str, Any]:
    from safetensors.numpy import save_file

    tensors = {"mean": pca.mean, "components": pca.components, "variances": pca.variances}
    with replacing(folder.pca) as temporary:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, temporary)
    return {"sha256": sha256_of(folder.pca), "explained": pca.explained}
