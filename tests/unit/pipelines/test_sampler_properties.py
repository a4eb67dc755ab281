"""Property-based tests of the samplers for random sizes, world sizes and batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.sampler import EvalSampler, TrainSampler

IMAGENET = 1_281_167
WORLDS = st.sampled_from([1, 2, 3, 4, 8])
SIZES = st.one_of(st.sampled_from([1, 7, 103]), st.integers(1, 400))
KEYS = st.integers(0, 2**40)


def epoch_of(samples: int, batch: int, seed: int, epoch: int, world: int) -> list[np.ndarray]:
    """The global batches, the ranks' parts joined in rank order."""
    ranks = [TrainSampler(samples, batch, seed, rank, world) for rank in range(world)]
    assert {sampler.steps_per_epoch for sampler in ranks} == {samples // batch}, (
        "collectives need equal step counts"
    )
    steps = range(samples // batch)
    return [np.concatenate([sampler.indices(epoch, step) for sampler in ranks]) for step in steps]


@settings(max_examples=60, deadline=None)
@given(SIZES, WORLDS, st.integers(1, 12), KEYS, st.integers(0, 90))
def test_epoch_has_no_sample_twice_and_drops_the_remainder(
    samples: int, world: int, per_rank: int, seed: int, epoch: int
) -> None:
    batch = world * per_rank
    steps = epoch_of(samples, batch, seed, epoch, world)
    seen = np.concatenate([np.empty(0, dtype=np.int64), *steps])
    assert len(np.unique(seen)) == len(seen) == samples - samples % batch
    assert ((seen >= 0) & (seen < samples)).all()
    alone = epoch_of(samples, batch, seed, epoch, 1)
    assert all(np.array_equal(a, b) for a, b in zip(steps, alone, strict=True)), "the same global batches"


@settings(max_examples=60, deadline=None)
@given(SIZES, WORLDS, st.integers(1, 64))
def test_validation_has_every_sample_once_in_equal_steps(samples: int, world: int, batch: int) -> None:
    ranks = [EvalSampler(samples, batch, rank, world) for rank in range(world)]
    assert len({sampler.steps_per_epoch for sampler in ranks}) == 1
    seen = [sampler.indices(0, step) for sampler in ranks for step in range(sampler.steps_per_epoch)]
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(samples))


@pytest.mark.parametrize("batch", [1000, 1536])
def test_imagenet_epochs(batch: int) -> None:
    """Every sample once except the remainder, which differs per epoch; ranks have parts of the same batches."""
    left_over = []
    for epoch in (0, 1):
        sampler = TrainSampler(IMAGENET, batch, 0)
        epoch_samples = TrainSampler(IMAGENET, sampler.steps_per_epoch * batch, 0).indices(epoch, 0)
        seen = np.bincount(epoch_samples, minlength=IMAGENET)
        assert seen.max() == 1
        left_over.append(np.flatnonzero(seen == 0))
        assert len(left_over[-1]) == IMAGENET % batch
        for world in (w for w in (1, 2, 3, 4, 8) if batch % w == 0):
            for step in (0, 7, sampler.steps_per_epoch - 1):
                parts = [
                    TrainSampler(IMAGENET, batch, 0, r, world).indices(epoch, step) for r in range(world)
                ]
                assert np.array_equal(np.concatenate(parts), epoch_samples[step * batch : (step + 1) * batch])
    assert len(np.intersect1d(*left_over)) < len(left_over[0]) // 10


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_imagenet_validation_counts(world: int) -> None:
    ranks = [EvalSampler(IMAGENET, 1000, rank, world) for rank in range(world)]
    assert len({sampler.steps_per_epoch for sampler in ranks}) == 1
    assert sum(len(o.indices(0, s)) for o in ranks for s in range(o.steps_per_epoch)) == IMAGENET
