"""Diagnostics compared with brute force: the margin, and values computed directly from the features."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from dl2pa.assignment import ClassStatistic, margin, match, second_best_margin
from dl2pa.assignment.diagnostics import compute_diagnostics

Floats = NDArray[np.float64]


def unit_rows(count: int, dim: int, seed: int) -> Floats:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def centered_cost(rows: Floats, points: Floats) -> Floats:
    return (rows.mean(axis=0) - rows) @ (points - points.mean(axis=0)).T


def optimum(cost: Floats) -> NDArray[np.int64]:
    return np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64)


def second_best(cost: Floats) -> float:
    """Forbid each edge of the optimum in turn and solve again."""
    rows, sigma = linear_sum_assignment(cost)
    best, others = cost[rows, sigma].sum(), []
    for row in rows:
        modified = cost.copy()
        modified[row, sigma[row]] = 1e6
        others.append(modified[linear_sum_assignment(modified)].sum())
    return min(others) - best


def cost_of(count: int, dim: int, seed: int, state: str) -> Floats:
    points = unit_rows(count, dim, seed)
    noise = unit_rows(count, dim, seed + 100)
    if state == "trained":
        return centered_cost(points[np.random.default_rng(seed).permutation(count)] + 0.4 * noise, points)
    if state == "untrained":
        return centered_cost(unit_rows(1, dim, seed + 200) + 0.1 * noise, points)
    return np.random.default_rng(seed).standard_normal((count, count))


@pytest.mark.parametrize("state", ["untrained", "trained", "any"])
def test_margin_equals_brute_force(state: str) -> None:
    shapes = [(2, 2), (3, 2), (7, 3), (30, 5), (80, 10), (80, 60)]
    for (count, dim), seed in itertools.product(shapes, range(2)):
        cost = cost_of(count, dim, seed, state)
        margin = second_best_margin(cost, optimum(cost))
        assert margin == pytest.approx(second_best(cost), abs=1e-10), (count, dim, seed)


@pytest.mark.parametrize("length", [3, 4, 7])
def test_margin_of_a_long_cycle(length: int) -> None:
    """A cyclic exchange of prototypes is cheap and every swap of two is expensive."""
    count = 12
    cost = np.full((count, count), 5.0)
    np.fill_diagonal(cost, 0.0)
    for label in range(length):
        cost[label, (label + 1) % length] = 0.01
    assert second_best_margin(cost, np.arange(count)) == pytest.approx(0.01 * length)
    shifted = cost + np.arange(count)[:, None] - 3.0 * np.arange(count) ** 2
    assert second_best_margin(shifted, np.arange(count)) == pytest.approx(0.01 * length, abs=1e-9)


def test_margin_equals_all_permutations_of_six() -> None:
    cost = cost_of(6, 3, 9, "untrained")
    values = sorted(sum(cost[i, p[i]] for i in range(6)) for p in itertools.permutations(range(6)))
    assert second_best_margin(cost, optimum(cost)) == pytest.approx(values[1] - values[0], abs=1e-12)


def test_margin_is_zero_with_two_classes_without_samples() -> None:
    points = unit_rows(6, 3, 0)
    rows = points.copy()
    rows[[1, 4]] = 0.0
    cost = centered_cost(rows, points)
    assert second_best_margin(cost, optimum(cost)) == pytest.approx(0.0, abs=1e-12)


def test_margin_is_none_above_the_maximum_number_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = cost_of(40, 5, 0, "any")
    monkeypatch.setattr(margin, "MAX_CLASSES", 39)
    assert second_best_margin(cost, optimum(cost)) is None
    monkeypatch.undo()
    assert second_best_margin(cost, optimum(cost)) is not None
    assert second_best_margin(np.zeros((1, 1)), np.zeros(1, dtype=np.int64)) is None


def test_inputs_are_not_modified() -> None:
    cost = cost_of(20, 4, 0, "untrained")
    sigma, copy = optimum(cost), cost.copy()
    second_best_margin(cost, sigma)
    assert np.array_equal(cost, copy)


SEEN = (0, 1, 3, 4, 5)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of any norm of 5 of 6 classes, with different spreads."""
    generator = torch.Generator().manual_seed(3)
    cluster = torch.randint(0, 5, (400,), generator=generator)
    centers = F.normalize(torch.randn(5, 4, generator=generator), dim=1)
    spread = torch.linspace(0.1, 0.9, 5)[cluster, None]
    features = centers[cluster] + spread * torch.randn(400, 4, generator=generator)
    return features * torch.rand(400, 1, generator=generator), torch.tensor(SEEN)[cluster]


def test_diagnostics_equal_values_from_the_features() -> None:
    features, labels = samples()
    statistic = ClassStatistic(6, 4)
    statistic.add(features, labels)
    points = torch.from_numpy(unit_rows(6, 4, 1)).float()
    result = match(statistic, points, torch.arange(6))
    assert result.diagnostics is not None
    diagnostics = result.diagnostics

    f = F.normalize(features.double(), dim=1).numpy()
    y = labels.numpy()
    means = {c: f[y == c].mean(0) for c in SEEN}
    directions = {c: mean / np.linalg.norm(mean) for c, mean in means.items()}
    compactness = {c: (f[y == c] @ directions[c]).mean() for c in SEEN}
    assert diagnostics.compactness == pytest.approx(np.mean(list(compactness.values())), abs=1e-6)
    assert diagnostics.loosest_class == min(compactness, key=lambda c: compactness[c]) > 2
    pairs = {(a, b): directions[a] @ directions[b] for a, b in itertools.combinations(SEEN, 2)}
    assert diagnostics.mean_cosine == pytest.approx(np.mean(list(pairs.values())), abs=1e-6)
    assert diagnostics.closest_classes == max(pairs, key=lambda pair: pairs[pair])
    assert diagnostics.closest_classes[1] > 2, "after the class without samples"
    assert diagnostics.largest_cosine == pytest.approx(max(pairs.values()), abs=1e-6)
    assert set(diagnostics.metrics()) == {
        "margin",
        "compactness",
        "mean_class_cosine",
        "largest_class_cosine",
        "alignment",
    }


def test_update_reports_moves_and_gain() -> None:
    points = torch.from_numpy(unit_rows(6, 3, 4)).float()
    planted = torch.tensor([1, 0, 2, 5, 3, 4])
    statistic = ClassStatistic(6, 3)
    statistic.add(7.0 * points[planted], torch.arange(6))
    result = match(statistic, points, torch.arange(6))
    assert result.moves == ((0, 0, 1), (1, 1, 0), (3, 3, 5), (4, 4, 3), (5, 5, 4))
    assert result.moved == 5
    metrics = result.metrics()
    assert metrics["objective_gain"] == pytest.approx(result.objective_after - result.objective_before)
    assert metrics["objective_gain"] > 0.1
    assert result.diagnostics is not None
    rows = points.double().numpy()
    assert metrics["margin"] == pytest.approx(second_best(-rows[planted] @ rows.T), abs=1e-6)
    assert "seconds" not in metrics, "a time would differ after a resume"


def test_diagnostics_without_samples_are_none() -> None:
    empty = match(ClassStatistic(3, 2), torch.eye(3, 2), torch.arange(3)).diagnostics
    assert empty is not None
    assert (empty.compactness, empty.mean_cosine, empty.closest_classes) == (None, None, None)
    assert set(empty.metrics()) == {"margin"}
    means = np.array([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0]])
    one = compute_diagnostics(means, np.array([2.0, 0.0, 1.0]))
    assert (one.compactness, one.loosest_class, one.largest_cosine) == (0.5, 0, None)
