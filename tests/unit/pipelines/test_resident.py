from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

from dl2pa.errors import UserError
from pipelines.batch import Pipeline
from pipelines.datasets.arrays import ArrayDataset
from pipelines.datasets.table import ImageTable
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.transforms import Transforms, finish

Build = Callable[..., Pipeline]
SIDE = 12
CROPPED = Transforms(SIDE, train=True, crop="pad", pad=3)


@pytest.fixture
def arrays() -> ArrayDataset:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (50, SIDE, SIDE, 3), dtype=np.uint8)
    return ArrayDataset(images, rng.integers(0, 7, 50), tuple("abcdefg"), "f")


def raw(pipeline: Pipeline, transforms: Transforms, epoch: int = 0) -> dict[int, torch.Tensor]:
    """Pixels of each sample as uint8 [3, H, W], without normalization."""
    pipeline.start(epoch)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transforms.mean, transforms.std))
    pairs = [(i, x) for b in pipeline for i, x in zip(b.indices.tolist(), b.images, strict=True)]
    return {i: ((x * std + mean) * 255).round().to(torch.uint8) for i, x in pairs}


def test_crops_are_windows_of_the_zero_padded_image(arrays: ArrayDataset, pipeline_over: Build) -> None:
    seen = raw(pipeline_over(arrays, "resident", CROPPED, TrainSampler(50, 10, 0)), CROPPED)
    assert len(seen) == 50
    crops: set[tuple[int, int, bool]] = set()
    for sample, pixels in seen.items():
        padded = F.pad(torch.from_numpy(arrays.images[sample]).permute(2, 0, 1), (3, 3, 3, 3))
        matches = [
            (top, left, flip)
            for top in range(7)
            for left in range(7)
            for flip in (False, True)
            if torch.equal(
                padded[:, top : top + SIDE, left : left + SIDE].flip(2)
                if flip
                else padded[:, top : top + SIDE, left : left + SIDE],
                pixels,
            )
        ]
        assert len(matches) == 1
        crops.add(matches[0])
    assert len({p[0] for p in crops}) == 7
    assert len({p[1] for p in crops}) == 7
    assert {p[2] for p in crops} == {False, True}


def test_images_are_unchanged_without_crop_and_flip(arrays: ArrayDataset, pipeline_over: Build) -> None:
    transforms = Transforms(SIDE, train=True, crop="none", flip=0.0)
    for sample, pixels in raw(
        pipeline_over(arrays, "resident", transforms, TrainSampler(50, 10, 0)), transforms
    ).items():
        assert torch.equal(pixels, torch.from_numpy(arrays.images[sample]).permute(2, 0, 1))


def test_validation_yields_every_image_once_unchanged(arrays: ArrayDataset, pipeline_over: Build) -> None:
    transforms = Transforms(SIDE, train=False, crop="pad", pad=3, flip=1.0)
    (batch, last) = pipeline_over(arrays, "resident", transforms, EvalSampler(50, 32))
    assert (batch.valid, last.valid, len(last.images)) == (32, 18, 32)
    images = torch.from_numpy(arrays.images)
    assert torch.equal(batch.images, finish(transforms, images[:32], 0, 0, np.arange(32)))
    assert torch.equal(last.images[:18], finish(transforms, images[32:], 0, 0, np.arange(18)))
    assert batch.targets.tolist() == arrays.labels[:32].tolist()


@pytest.mark.parametrize("world", [2, 5])
def test_every_world_size_and_start_gives_the_same_batches(
    arrays: ArrayDataset, pipeline_over: Build, world: int
) -> None:
    transforms = Transforms(SIDE, train=True, crop="pad", pad=3, trivial_augment=True, erasing=0.5)
    alone = pipeline_over(arrays, "resident", transforms, TrainSampler(50, 10, 0))
    alone.start(3)
    batches = list(alone)
    ranks = [
        pipeline_over(arrays, "resident", transforms, TrainSampler(50, 10, 0, rank, world))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start(3, 2)
    for batch, *parts in zip(batches[2:], *ranks, strict=True):
        assert torch.equal(torch.cat([p.images for p in parts]), batch.images)
        assert torch.equal(torch.cat([p.targets for p in parts]), batch.targets)
    alone.start(3, 5)
    assert list(alone) == []


def test_augmentation_differs_per_epoch(arrays: ArrayDataset, pipeline_over: Build) -> None:
    pipeline = pipeline_over(arrays, "resident", CROPPED, TrainSampler(50, 10, 0))
    first, second = raw(pipeline, CROPPED, 0), raw(pipeline, CROPPED, 1)
    assert sum(torch.equal(first[i], second[i]) for i in first.keys() & second.keys()) < 10


def test_image_folder_can_be_resident(
    drawn: Any, folder: Callable[..., ImageTable], pipeline_over: Build
) -> None:
    transforms = Transforms(20, train=False)
    (batch,) = pipeline_over(folder(5), "resident", transforms, EvalSampler(5, 5))
    transform = v2.Compose([v2.Resize(20), v2.CenterCrop(20), v2.PILToTensor()])
    decoded = [Image.open(io.BytesIO(drawn.encoded(i))) for i in range(5)]
    expected = torch.stack([transform(image) for image in decoded]).permute(0, 2, 3, 1)
    assert torch.equal(batch.images, finish(transforms, expected, 0, 0, np.arange(5)))
    assert batch.targets.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8cut"])
def test_unreadable_image_is_reported(
    folder: Callable[..., ImageTable], pipeline_over: Build, content: bytes
) -> None:
    dataset = folder(5, {3: content})
    with pytest.raises(UserError) as caught:
        pipeline_over(dataset, "resident", Transforms(20, train=True), TrainSampler(5, 5, 0))
    assert caught.value.field == "data.root"
    assert caught.value.value == str(dataset.path(3))


def test_file_loader_refuses_arrays(arrays: ArrayDataset, pipeline_over: Build) -> None:
    with pytest.raises(UserError) as caught:
        pipeline_over(arrays, "dali", CROPPED, TrainSampler(50, 10, 0))
    assert caught.value.field == "data.loader"
