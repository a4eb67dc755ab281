from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dl2pa.assignment import solve_assignment

Floats = NDArray[np.float64]


def unit_rows(count: int, dim: int, seed: int) -> Floats:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def objective(rows: Floats, points: Floats, sigma: NDArray[np.int64]) -> float:
    return float((rows * points[sigma]).sum())


@given(classes=st.integers(2, 6), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_the_best_of_all_permutations_is_found(classes: int, seed: int) -> None:
    rows, points = unit_rows(classes, 3, seed), unit_rows(classes, 3, seed + 100)
    sigma = solve_assignment(rows, points)
    assert sorted(sigma.tolist()) == list(range(classes))
    every = (np.array(p) for p in itertools.permutations(range(classes)))
    assert objective(rows, points, sigma) == pytest.approx(max(objective(rows, points, p) for p in every))


@pytest.mark.parametrize("seed", range(3))
def test_classes_that_share_a_direction_are_still_matched_exactly(seed: int) -> None:
    """An untrained network: what is centred away must not change which permutation wins."""
    rows = unit_rows(6, 3, seed) * 1e-3 + np.array([5.0, -2.0, 1.0])
    points = unit_rows(6, 3, seed + 10) + 0.7
    every = (np.array(p) for p in itertools.permutations(range(6)))
    best = max(every, key=lambda p: objective(rows, points, p))
    assert solve_assignment(rows, points).tolist() == best.tolist()


@pytest.mark.parametrize(("classes", "dim"), [(100, 10), (300, 64)])
def test_a_planted_permutation_is_recovered(classes: int, dim: int) -> None:
    points = unit_rows(classes, dim, 0)
    planted = np.random.default_rng(1).permutation(classes)
    assert solve_assignment(points[planted], points).tolist() == planted.tolist()
    noisy = points[planted] + 0.05 * unit_rows(classes, dim, 2)
    assert solve_assignment(noisy, points).tolist() == planted.tolist()


def test_classes_never_seen_take_the_prototypes_that_are_left() -> None:
    points = unit_rows(8, 4, 0)
    rows = points[[3, 1, 7, 0, 2, 4, 5, 6]].copy()
    rows[[2, 5]] = 0.0
    sigma = solve_assignment(rows, points)
    assert sigma[[0, 1, 3, 4, 6, 7]].tolist() == [3, 1, 0, 2, 5, 6]
    assert set(sigma[[2, 5]].tolist()) == {7, 4}


def test_the_inputs_are_left_alone() -> None:
    rows, points = unit_rows(5, 3, 0), unit_rows(5, 3, 1)
    copies = rows.copy(), points.copy()
    solve_assignment(rows, points)
    assert np.array_equal(rows, copies[0])
    assert np.array_equal(points, copies[1])
