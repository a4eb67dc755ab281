from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipelines.batch import Pipeline
from pipelines.dataset import SyntheticDataset
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.transforms import Transforms

Build = Callable[..., Pipeline]
TRANSFORMS = Transforms(8, train=True)
DATASET = SyntheticDataset(100, tuple("abcde"))


def test_batches_have_the_form_of_image_batches(pipeline_over: Build) -> None:
    batches = list(pipeline_over(DATASET, "synthetic", TRANSFORMS, TrainSampler(100, 12, 0)))
    assert len(batches) == 8
    images = torch.cat([b.images for b in batches])
    assert images.shape == (96, 3, 8, 8)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert abs(images.mean()) < 0.1
    targets = torch.cat([b.targets for b in batches])
    assert set(targets.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("world", [2, 4])
def test_every_world_size_and_start_gives_the_same_batches(pipeline_over: Build, world: int) -> None:
    alone = pipeline_over(DATASET, "synthetic", TRANSFORMS, TrainSampler(100, 12, 0))
    ranks = [
        pipeline_over(DATASET, "synthetic", TRANSFORMS, TrainSampler(100, 12, 0, rank, world))
        for rank in range(world)
    ]
    for pipeline in (alone, *ranks):
        pipeline.start(2, 3)
    for batch, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(torch.cat([p.images for p in parts]), batch.images)
        assert torch.equal(torch.cat([p.targets for p in parts]), batch.targets)


def test_image_and_label_depend_on_seed_and_sample(pipeline_over: Build) -> None:
    def samples(seed: int, epoch: int) -> dict[int, tuple[int, float]]:
        pipeline = pipeline_over(DATASET, "synthetic", TRANSFORMS, TrainSampler(100, 10, 0), seed=seed)
        pipeline.start(epoch)
        return {
            i: (t, x.sum().item())
            for b in pipeline
            for i, t, x in zip(b.indices.tolist(), b.targets.tolist(), b.images, strict=True)
        }

    assert samples(0, 0) == samples(0, 1)
    assert samples(0, 0) != samples(1, 0)


def test_validation_pads_the_last_batch(pipeline_over: Build) -> None:
    batches = list(pipeline_over(DATASET, "synthetic", Transforms(8, train=False), EvalSampler(100, 32)))
    assert [b.valid for b in batches] == [32, 32, 32, 4]
    assert [len(b.images) for b in batches] == [32] * 4
