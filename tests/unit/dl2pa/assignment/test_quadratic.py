"""Assignment by class similarity: compared with brute force; invariant to rotations of either space."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dl2pa.assignment import ClassStatistic, QuadraticSolver, match, quadratic, rotate
from dl2pa.assignment.quadratic import alignment, similarity_factor, solve_quadratic
from dl2pa.assignment.rotation import best_rotation
from dl2pa.methods.prototypical import assignment_from_vectors

Floats = NDArray[np.float64]


def unit_rows(count: int, dim: int, seed: int) -> Floats:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def objective(factor: Floats, points: Floats, sigma: NDArray[np.int64]) -> float:
    """Σ_{i≠j} G_ij p_σ(i) · p_σ(j), from the C × C matrices."""
    product = (factor @ factor.T) * (points[sigma] @ points[sigma].T)
    return float(product.sum() - np.trace(product))


def clustered(count: int, clusters: int, dim: int, seed: int) -> Floats:
    """Rows of clusters: row i belongs to cluster i % clusters."""
    return unit_rows(clusters, dim, seed)[np.arange(count) % clusters] + 0.3 * unit_rows(count, dim, seed + 1)


@pytest.mark.parametrize("seed", range(8))
def test_small_problems_equal_brute_force(seed: int) -> None:
    factor, points = similarity_factor(unit_rows(6, 4, seed)), unit_rows(6, 3, seed + 1000)
    solution = solve_quadratic(factor, points, np.arange(6))
    best = max(objective(factor, points, np.array(p)) for p in itertools.permutations(range(6)))
    assert objective(factor, points, solution.assignment) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("dense", [0, 40])
def test_no_swap_of_two_labels_improves_the_result(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both linear solvers."""
    monkeypatch.setattr(quadratic, "_DENSE_CLASSES", dense)
    count = 40
    factor, points = similarity_factor(clustered(count, 5, 20, 1)), clustered(count, 7, 4, 3)
    current = np.random.default_rng(0).permutation(count)
    sigma = solve_quadratic(factor, points, current, starts=1).assignment
    assert sorted(sigma) == list(range(count))
    value = objective(factor, points, sigma)
    assert value > objective(factor, points, current) + 1
    for i, j in np.random.default_rng(1).integers(0, count, (200, 2)):
        swapped = sigma.copy()
        swapped[[i, j]] = sigma[[j, i]]
        assert objective(factor, points, swapped) <= value + 1e-4


def test_rotations_of_classes_or_prototypes_do_not_change_the_objective() -> None:
    """The linear assignment depends on the rotation; this one recovers hidden clusters without a common space."""
    directions, points = clustered(40, 4, 30, 5), unit_rows(4, 6, 9)[np.repeat(np.arange(4), 10)]
    points = points + 0.01 * unit_rows(40, 6, 10)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    sigma = solve_quadratic(similarity_factor(directions), points, np.arange(40)).assignment
    for cluster in range(4):  # the labels of a cluster get the prototypes of one cluster
        assert len({int(s) // 10 for s in sigma[cluster::4]}) == 1


def test_the_current_assignment_is_kept_unless_a_better_one_is_found() -> None:
    factor, points = similarity_factor(clustered(30, 3, 8, 2)), unit_rows(30, 5, 4)
    best = solve_quadratic(factor, points, np.arange(30)).assignment
    again = solve_quadratic(factor, points, best).assignment
    assert objective(factor, points, again) >= objective(factor, points, best)
    nothing = solve_quadratic(np.zeros((30, 8)), points, best).assignment
    assert np.array_equal(nothing, best)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    factor, points = similarity_factor(clustered(150, 9, 64, 1)), unit_rows(150, 16, 2)
    results: list[NDArray[np.int64]] = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            results.append(solve_quadratic(factor, points, np.arange(150), starts=1).assignment)
    assert np.array_equal(*results)


def test_classes_without_samples_have_no_similarity() -> None:
    directions = clustered(10, 2, 6, 1)
    directions[3] = 0.0
    factor = similarity_factor(directions)
    assert not factor[3].any()
    seen = np.delete(np.arange(10), 3)
    centered = directions[seen] - directions[seen].mean(axis=0)
    assert factor[seen] == pytest.approx(centered / np.linalg.norm(centered, axis=1, keepdims=True))


def test_the_alignment_of_a_tight_frame_that_spans_the_leading_eigenvectors_is_one() -> None:
    simplex = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5
    assert alignment(similarity_factor(simplex), simplex, np.arange(4)) == pytest.approx(1.0)
    factor, points = similarity_factor(unit_rows(9, 12, 1)), unit_rows(9, 3, 2)
    values = np.sort(np.linalg.eigvalsh(factor @ factor.T))[::-1]
    trace = np.trace(points.T @ factor @ factor.T @ points)
    expected = trace / (9 / 3 * values[:3].sum())
    assert alignment(factor, points, np.arange(9)) == pytest.approx(expected)


def test_rotation_keeps_angles_and_finds_the_class_means() -> None:
    points = torch.from_numpy(unit_rows(12, 4, 1)).float()
    before, sigma = points.clone(), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(torch.from_numpy(unit_rows(4, 4, 2))).Q
    directions = before.double()[sigma] @ rotation
    directions[5] = 0.0
    stayed = rotate(points, sigma, directions)
    expected = before.double() @ rotation
    assert torch.allclose(points.double(), expected, atol=1e-6)
    assert stayed == pytest.approx(float((before.double() * expected).sum(dim=1).mean()), abs=1e-6)
    assert torch.allclose(points @ points.T, before @ before.T, atol=1e-5)
    assert torch.allclose(
        best_rotation(directions, torch.zeros_like(directions)).det().abs(), torch.ones(()).double()
    )


def test_pooled_features_decide_the_update() -> None:
    """The class means of the embedding equal their prototypes, so that its own update would move no label."""
    points = torch.from_numpy(unit_rows(20, 3, 1)).float()
    own, pooled = ClassStatistic(20, 3), ClassStatistic(20, 7)
    labels, features = torch.arange(20), torch.from_numpy(clustered(20, 4, 7, 3)).float()
    for solver in (None, QuadraticSolver()):
        own.add(points, labels)
        pooled.add(features, labels)
        sigma = torch.arange(20)
        result = match(own, points, sigma, solver=solver, pooled=pooled)
        vectors = torch.nn.functional.normalize(features.double(), dim=1)
        expected = assignment_from_vectors(points, vectors, quadratic=solver is not None)
        assert torch.equal(sigma, expected)
        assert result.moved == int((sigma != labels).sum()) > 10
        assert not pooled.counts.any()
        assert result.diagnostics is not None
        assert result.metrics()["alignment"] == result.diagnostics.alignment
        factor = similarity_factor(vectors.numpy())
        assert result.metrics()["alignment"] == pytest.approx(
            alignment(factor, points.double().numpy(), sigma.numpy()), abs=1e-6
        )
