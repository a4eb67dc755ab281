from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.sampler import EvalSampler, TrainSampler, permute

SIZES = [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4095, 4097, 65_537]


def test_permutation_is_a_bijection() -> None:
    for size, key in itertools.product(SIZES, ((0, 1, 0), (7, 1, 3), (-5, 1, 2**40))):
        image = permute(np.arange(size), size, *key)
        assert np.array_equal(np.sort(image), np.arange(size)), (size, key)


def test_permutation_of_a_position_is_independent_of_others() -> None:
    full = permute(np.arange(1000), 1000, 3, 1, 4)
    for part in (np.array([17]), np.arange(990, 1000), np.array([999, 0, 500])):
        assert np.array_equal(permute(part, 1000, 3, 1, 4), full[part])


def test_permutation_of_the_size_of_imagenet() -> None:
    positions = np.arange(0, 1_281_167, 13_001)
    image = permute(positions, 1_281_167, 0, 1, 0)
    assert len(set(image.tolist())) == len(positions)
    assert image.min() >= 0
    assert image.max() < 1_281_167


def test_permutations_look_random() -> None:
    """Neighbors are uncorrelated, keys differ, and every position is equally likely."""
    size = 5_000
    image = permute(np.arange(size), size, 0, 1, 0)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.06
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.06
    other = permute(np.arange(size), size, 0, 1, 1)
    assert (image == other).sum() < 10
    firsts = [int(permute(np.arange(1), 10, 0, 1, epoch)[0]) for epoch in range(2000)]
    assert np.abs(np.bincount(firsts, minlength=10) - 200).max() < 70


def global_batches(samples: int, batch: int, epoch: int, world: int, seed: int = 0) -> list[list[int]]:
    ranks = [TrainSampler(samples, batch, seed, rank, world) for rank in range(world)]
    assert {sampler.steps_per_epoch for sampler in ranks} == {samples // batch}
    return [
        [i for sampler in ranks for i in sampler.indices(epoch, step).tolist()]
        for step in range(samples // batch)
    ]


@pytest.mark.parametrize(("samples", "batch"), [(100, 12), (60, 60), (1001, 24), (25, 12)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_world_size_gives_the_same_batches(samples: int, batch: int, epoch: int) -> None:
    alone = global_batches(samples, batch, epoch, 1)
    flat = [i for step in alone for i in step]
    assert len(flat) == len(set(flat)) == samples // batch * batch
    assert set(flat) <= set(range(samples))
    for world in (2, 3, 4, 6, 12):
        assert global_batches(samples, batch, epoch, world) == alone


def test_dropped_samples_differ_per_epoch() -> None:
    dropped = []
    for epoch in range(30):
        seen = {i for step in global_batches(103, 20, epoch, 2) for i in step}
        dropped.append(frozenset(set(range(103)) - seen))
        assert len(dropped[-1]) == 3
    assert len(set(dropped)) == 30
    assert len(frozenset().union(*dropped)) > 40


def test_order_depends_on_epoch_and_seed() -> None:
    orders = {str(global_batches(50, 10, e, 1, seed=s)) for e, s in ((0, 0), (1, 0), (0, 1), (1, 1))}
    assert len(orders) == 4


@settings(deadline=None)
@given(samples=st.integers(1, 120), world=st.integers(1, 8), batch=st.integers(1, 200))
def test_evaluation_has_each_sample_once_in_equal_steps(samples: int, world: int, batch: int) -> None:
    ranks = [EvalSampler(samples, batch, rank, world) for rank in range(world)]
    assert len({(sampler.steps_per_epoch, sampler.local_batch) for sampler in ranks}) == 1
    seen: list[int] = []
    for sampler in ranks:
        for step in range(sampler.steps_per_epoch):
            part = sampler.indices(0, step).tolist()
            assert len(part) <= sampler.local_batch
            seen += part
    assert sorted(seen) == list(range(samples))
    assert (ranks[0].steps_per_epoch - 1) * ranks[0].local_batch * world < samples, "no step without a sample"
