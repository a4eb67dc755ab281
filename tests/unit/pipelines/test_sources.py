"""Lists, Parquet files and a user's function give the batches of the folder, from any step, with both loaders."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.batch import Batch, Pipeline
from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets.build_index import build_index
from pipelines.datasets.index import INDEX_NAME
from pipelines.datasets.lists import ListOptions
from pipelines.decoded import decode_folder
from pipelines.sampler import TrainSampler
from pipelines.transforms import Transforms

COUNT, BATCH = 22, 4
TRAIN = Transforms(24, train=True, trivial_augment=True)


def of_list(folder: ImageTable, place: Path) -> ImageTable:
    lines = [f"{name} {label}\n" for name, label in zip(folder.files, folder.labels.tolist(), strict=True)]
    (place / "list.txt").write_text("".join(lines))
    build_index(folder.root, place / INDEX_NAME, 1, options=ListOptions(place / "list.txt"))
    return _opened("imagefolder", folder.root, index=place / INDEX_NAME)


def of_parquet(folder: ImageTable, place: Path) -> ImageTable:
    images = [{"bytes": folder.read(i), "path": name} for i, name in enumerate(folder.files)]
    table = pa.table({"image": images, "label": folder.labels})
    pq.write_table(table, place / "train-0.parquet", row_group_size=8)
    build_index(place, place / INDEX_NAME, 1)
    return _opened("imagefolder", place)


def of_function(folder: ImageTable, place: Path) -> ImageTable:
    samples = [(folder.read(i), label) for i, label in enumerate(folder.labels.tolist())]
    samples[3] = (folder.path(3), samples[3][1])
    module: Any = type(sys)("own_source")
    module.images = lambda split, root: (samples, ("a", "b"))
    sys.modules["own_source"] = module
    return _opened("own_source:images", None)


def _opened(name: str, root: Path | None, **options: Any) -> ImageTable:
    table = open_dataset(name, root, None, None, "train", **options)
    assert isinstance(table, ImageTable)
    return table


def same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x.images, y.images) and torch.equal(x.targets, y.targets) for x, y in pairs)


SOURCES = pytest.mark.parametrize("source", [of_list, of_parquet, of_function], ids=lambda f: f.__name__)


@SOURCES
@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_batches_are_those_of_the_folder_from_any_step(
    folder: Callable[..., ImageTable],
    pipeline_over: Callable[..., Pipeline],
    tmp_path: Path,
    source: Callable[[ImageTable, Path], ImageTable],
    loader: str,
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    images = folder(COUNT)
    place = tmp_path / "source"
    place.mkdir()
    expected = list(pipeline_over(images, loader, TRAIN, TrainSampler(COUNT, BATCH, 0)))
    pipeline = pipeline_over(source(images, place), loader, TRAIN, TrainSampler(COUNT, BATCH, 0))
    assert same(list(pipeline), expected)
    pipeline.start(0, 3)
    assert same(list(pipeline), expected[3:])


@SOURCES
def test_pixels_in_memory_are_those_of_the_folder(
    folder: Callable[..., ImageTable], tmp_path: Path, source: Callable[[ImageTable, Path], ImageTable]
) -> None:
    images = folder(COUNT)
    place = tmp_path / "source"
    place.mkdir()
    expected = decode_folder(images, 24, 1)
    decoded = decode_folder(source(images, place), 24, 1)
    assert np.array_equal(decoded.images, expected.images)
    assert np.array_equal(decoded.labels, expected.labels)
