from __future__ import annotations

import numpy as np
import pytest

from pipelines.rng import Stream, randint, random_bits, uniform

MANY = np.arange(50_000)


def test_bits_of_a_key_never_change() -> None:
    """Frozen values: a change here changes every batch of every earlier run."""
    assert random_bits(0).item() == 16294208416658607535
    assert random_bits(1, Stream.CROP, 3, np.array([5, 6])).tolist() == [
        int(random_bits(1, 2, 3, 5)),
        int(random_bits(1, 2, 3, 6)),
    ]


def test_bits_depend_on_every_word_and_its_position() -> None:
    keys = [(0,), (0, 0), (0, 1), (1, 0), (1,), (0, 0, 0), (-1,), (2**62,), (1, 2, 3), (3, 2, 1)]
    assert len({int(random_bits(*key)) for key in keys}) == len(keys)


def test_keys_broadcast() -> None:
    grid = random_bits(7, np.arange(3)[:, None], np.arange(4))
    assert grid.shape == (3, 4)
    assert grid[2, 1] == random_bits(7, 2, 1)
    assert len(np.unique(random_bits(7, MANY))) == len(MANY)


def test_uniform_numbers_are_uniform_and_independent_between_streams() -> None:
    a, b = uniform(0, 1, MANY), uniform(0, 2, MANY)
    for values in (a, b):
        assert values.min() >= 0
        assert values.max() < 1
        counts, _ = np.histogram(values, 50, (0, 1))
        assert ((counts - 1000) ** 2 / 1000).sum() < 100, "chi-square with 49 degrees of freedom"
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("bound", [1, 2, 7, 1000])
def test_integers_are_uniform(bound: int) -> None:
    values = randint(bound, 3, MANY)
    assert values.dtype == np.int64
    assert values.min() >= 0
    assert values.max() < bound
    counts = np.bincount(values, minlength=bound)
    assert np.abs(counts - len(MANY) / bound).max() < 6 * np.sqrt(len(MANY) / bound)


def test_bounds_may_differ_per_key() -> None:
    bounds = MANY % 9 + 1
    values = randint(bounds, 1, MANY)
    assert (values < bounds).all()
    assert all(values[bounds == n].max() == n - 1 for n in range(1, 10))
