"""Write the principal components of an existing feature data set, without another pass of the network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dl2pa.errors import UserError
from dl2pa.features.join import Block, join
from dl2pa.osutil import replacing, write_json
from pipelines.datasets.features import FeatureDataset, FeatureFolder, check_digest, load_features

_ROWS = 2048


def project_features(root: Path, out: Path, pca: int, dtype: str) -> dict[str, Any]:
    """Write the `pca` principal components of the features in `root` to the folder `out`; returns the record.

    Raises:
        UserError: the features are damaged or are components already, or `out` is not an empty folder.
    """
    source, folder = FeatureFolder(root), FeatureFolder(out)
    record = source.read_complete()
    if record["network"]["pca"]:
        raise UserError(
            "data.root", str(root), "contains principal components", "Give the features of the network."
        )
    if out.exists() and any(out.iterdir()):
        raise UserError("--out", str(out), "is not empty", "Give a new folder.")
    began = time.monotonic()
    splits = {split: load_features(root, split) for split in ("train", "val")}
    limit = min(record["dim"], len(splits["train"]))
    if not 1 <= pca <= limit:
        raise UserError("--pca", pca, f"must be from 1 to {limit}", f"Give at most {limit}.")
    check_digest(source.backbone, record["network"]["sha256"])
    folder.root.mkdir(parents=True, exist_ok=True)
    with replacing(folder.backbone) as temporary:
        shutil.copyfile(source.backbone, temporary)
    skipped = {split: known["skipped"] for split, known in record["splits"].items()}
    record |= {"dim": pca, "dtype": dtype, "network": {**record["network"], "dim": pca}}
    record["identity"] = {**record["identity"], "--pca": pca, "--dtype": dtype}
    join(folder, lambda split: _blocks(splits[split]), record, pca)
    for split, known in record["splits"].items():
        known["skipped"] = skipped[split]
    seconds = time.monotonic() - began
    record |= {"seconds": seconds, "images_per_second": sum(map(len, splits.values())) / seconds}
    write_json(folder.record, record, indent=1)
    return record


def _blocks(dataset: FeatureDataset) -> Iterator[Block]:
    for start in range(0, len(dataset), _ROWS):
        yield dataset.features[start : start + _ROWS], dataset.labels[start : start + _ROWS]
