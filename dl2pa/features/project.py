"""Write the principal components of an existing feature data set, without another pass of the network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dl2pa.errors import UserError
from dl2pa.features.join import Block, join_again
from dl2pa.osutil import replacing
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
    record |= {"dim": pca, "dtype": dtype, "network": {**record["network"], "dim": pca}}
    record["identity"] = {**record["identity"], "--pca": pca, "--dtype": dtype}
    return join_again(folder, lambda split: _blocks(splits[split]), record, pca, began)


def _blocks(dataset: FeatureDataset) -> Iterator[Block]:
    for start in range(0, len(dataset), _ROWS):
        yield dataset.features[start : start + _ROWS], dataset.labels[start : start + _ROWS]
