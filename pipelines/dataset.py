"""A data set of any kind."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.datasets.arrays import ArrayDataset
from pipelines.datasets.features import FeatureDataset
from pipelines.datasets.table import ImageTable


@dataclass(frozen=True)
class SyntheticDataset:
    """A data set of generated images."""

    num_samples: int
    classes: tuple[str, ...]
    fingerprint: str = "synthetic"


Dataset = ArrayDataset | ImageTable | FeatureDataset | SyntheticDataset


def num_samples(dataset: Dataset) -> int:
    """Number of images, or of feature vectors, in the data set."""
    return dataset.num_samples if isinstance(dataset, SyntheticDataset) else len(dataset.labels)
