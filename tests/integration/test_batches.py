"""Every loader gives the same global batches for every world size and after every restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dl2pa.config import Config, parse_config
from dl2pa.training.data import build_eval_pipeline, build_train_pipeline, open_data
from dl2pa.training.distributed import World
from pipelines.batch import Batch
from support.runs import BASE, SIDE

BATCH, N = 48, 1438
LOADERS = {
    "dali": {"loader": "dali"},
    "torchvision": {"loader": "torchvision", "trivial_augment": False, "rand_augment": 2},
    "resident": {"loader": "resident", "crop": "pad", "pad": 2},
}
Global = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def make_config(digits: Path, loader: str, **train: Any) -> Config:
    tree = yaml.safe_load(yaml.safe_dump(BASE))
    augmented = {"trivial_augment": True, "color_jitter": [0.4, 0.4, 0.4, 0.1], "erasing": 0.25}
    tree["data"] |= {"root": str(digits), "flip": 0.5} | augmented | LOADERS[loader]
    tree["train"] |= train
    return parse_config(tree)


def world(rank: int, size: int, threads: int = 1) -> World:
    return World(rank, size, rank, size, torch.device("cpu"), threads)


def global_batches(
    config: Config, size: int, epoch: int, start: int = 0, stop: int | None = None, threads: int = 1
) -> Global:
    """Indices, targets and pixels of steps `start` to `stop` - 1, concatenated over the ranks."""
    data = open_data(config, size)
    pipelines = [build_train_pipeline(config, data.train, world(r, size, threads)) for r in range(size)]
    for pipeline in pipelines:
        pipeline.start(epoch, start)
    steps = pipelines[0].steps_per_epoch if stop is None else stop
    parts: list[Iterator[Batch]] = [iter(p) for p in pipelines]
    joined: Global = []
    for _ in range(start, steps):
        ranks = [next(part) for part in parts]
        assert all(batch.valid == BATCH // size == len(batch.targets) for batch in ranks)
        joined.append(
            (
                torch.cat([b.indices for b in ranks]),
                torch.cat([b.targets for b in ranks]),
                torch.cat([b.images for b in ranks]),
            )
        )
    for pipeline in pipelines:
        pipeline.close()
    return joined


def assert_same(actual: Global, expected: Global) -> None:
    assert len(actual) == len(expected)
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        for name, x, y in zip(("indices", "targets", "pixels"), a, b, strict=True):
            assert torch.equal(x, y), f"{name} of step {step}"


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_the_same_for_every_world_size_and_start(loader: str, digits: Path) -> None:
    config = make_config(digits, loader)
    alone = global_batches(config, 1, epoch=1, stop=9)
    assert alone[0][2].shape == (BATCH, 3, SIDE, SIDE)
    assert alone[0][2].is_contiguous(memory_format=torch.channels_last)
    for size in (2, 4):
        assert_same(global_batches(config, size, epoch=1, stop=9, threads=size), alone)
    assert_same(global_batches(config, 2, epoch=1, start=4, stop=9), alone[4:])
    other = global_batches(config, 1, epoch=2, stop=1)
    assert not torch.equal(other[0][0], alone[0][0])


@pytest.mark.parametrize("loader", LOADERS)
def test_abandoned_pipeline_restarts_at_any_step(loader: str, digits: Path) -> None:
    """The first iteration is abandoned in the middle of an epoch."""
    config = make_config(digits, loader)
    expected = global_batches(config, 1, epoch=3, start=26)
    assert len(expected) == 3
    pipeline = build_train_pipeline(config, open_data(config, 1).train, world(0, 1))
    pipeline.start(0)
    for _, _batch in zip(range(4), pipeline, strict=False):
        pass
    pipeline.start(3, 26)
    assert_same([(b.indices, b.targets, b.images) for b in pipeline], expected)
    pipeline.close()


def test_seed_changes_the_order(digits: Path) -> None:
    one = global_batches(make_config(digits, "torchvision", seed=1), 1, epoch=0, stop=1)
    two = global_batches(make_config(digits, "torchvision", seed=2), 1, epoch=0, stop=1)
    assert not torch.equal(one[0][0], two[0][0])


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_epoch_repeats_no_image_and_drops_the_remainder(size: int, digits: Path) -> None:
    config = make_config(digits, "resident")
    config = parse_config(
        with_changes(
            config, {"data": {"trivial_augment": False, "color_jitter": [0, 0, 0, 0], "erasing": 0.0}}
        )
    )
    dropped: list[frozenset[int]] = []
    for epoch in range(2):
        seen = torch.cat([indices for indices, _, _ in global_batches(config, size, epoch)]).tolist()
        assert len(seen) == len(set(seen)) == N - N % BATCH
        dropped.append(frozenset(range(N)) - frozenset(seen))
    assert all(len(d) == N % BATCH for d in dropped)
    assert len(set(dropped)) == 2


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [7, 103])
def test_validation_has_each_image_once(
    loader: str, size: int, count: int, digits: Path, tmp_path: Path
) -> None:
    some_images(digits / "val", tmp_path / "val", count)
    config = make_config(digits, loader, eval_batch_size=20)
    config = parse_config(with_changes(config, {"data": {"val_root": str(tmp_path / "val")}}))
    data = open_data(config, size)
    pipelines = [build_eval_pipeline(config, data.val, world(r, size)) for r in range(size)]
    seen: list[int] = []
    steps = set()
    for pipeline in pipelines:
        assert pipeline.num_samples == count
        pipeline.start(0)
        batches = list(pipeline)
        steps.add(len(batches))
        assert len({len(b.targets) for b in batches}) == 1, "padding keeps shapes equal"
        for batch in batches:
            seen += batch.indices[: batch.valid].tolist()
        pipeline.close()
    assert sorted(seen) == list(range(count))
    assert len(steps) == 1, "collectives need equal step counts"


def some_images(source: Path, target: Path, count: int) -> None:
    """Link `count` images of a tree of class folders into `target`, spread over the classes."""
    folders = sorted(source.iterdir())
    for i in range(count):
        folder = folders[i % len(folders)]
        file = sorted(folder.iterdir())[i // len(folders)]
        (target / folder.name).mkdir(parents=True, exist_ok=True)
        (target / folder.name / file.name).symlink_to(file)


def with_changes(config: Config, changes: dict[str, Any]) -> dict[str, Any]:
    from dl2pa.config import merge

    return merge(config.model_dump(mode="json"), changes)
