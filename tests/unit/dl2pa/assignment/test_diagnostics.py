"""The second best assignment by brute force, and what is said of the classes from the features themselves."""

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
        barred = cost.copy()
        barred[row, sigma[row]] = 1e6
        others.append(barred[linear_sum_assignment(barred)].sum())
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
def test_the_margin_is_that_of_the_second_best(state: str) -> None:
    shapes = [(2, 2), (3, 2), (7, 3), (30, 5), (80, 10), (80, 60)]
    for (count, dim), seed in itertools.product(shapes, range(2)):
        cost = cost_of(count, dim, seed, state)
        margin = second_best_margin(cost, optimum(cost))
        assert margin == pytest.approx(second_best(cost), abs=1e-10), (count, dim, seed)


@pytest.mark.parametrize("length", [3, 4, 7])
def test_a_long_cycle_can_be_the_cheapest_change(length: int) -> None:
    """Handing the prototypes round costs little where every swap of two costs much."""
    count = 12
    cost = np.full((count, count), 5.0)
    np.fill_diagonal(cost, 0.0)
    for label in range(length):
        cost[label, (label + 1) % length] = 0.01
    assert second_best_margin(cost, np.arange(count)) == pytest.approx(0.01 * length)
    shifted = cost + np.arange(count)[:, None] - 3.0 * np.arange(count) ** 2
    assert second_best_margin(shifted, np.arange(count)) == pytest.approx(0.01 * length, abs=1e-9)


def test_the_margin_of_all_permutations_of_six() -> None:
    cost = cost_of(6, 3, 9, "untrained")
    values = sorted(sum(cost[i, p[i]] for i in range(6)) for p in itertools.permutations(range(6)))
    assert second_best_margin(cost, optimum(cost)) == pytest.approx(values[1] - values[0], abs=1e-12)


def test_two_classes_never_seen_could_as_well_be_swapped() -> None:
    points = unit_rows(6, 3, 0)
    rows = points.copy()
    rows[[1, 4]] = 0.0
    cost = centered_cost(rows, points)
    assert second_best_margin(cost, optimum(cost)) == pytest.approx(0.0, abs=1e-12)


def test_what_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = cost_of(40, 5, 0, "any")
    monkeypatch.setattr(margin, "MOST_CLASSES", 39)
    assert second_best_margin(cost, optimum(cost)) is None
    monkeypatch.undo()
    assert second_best_margin(cost, optimum(cost)) is not None
    assert second_best_margin(np.zeros((1, 1)), np.zeros(1, dtype=np.int64)) is None


def test_the_inputs_are_left_alone() -> None:
    cost = cost_of(20, 4, 0, "untrained")
    sigma, copy = optimum(cost), cost.copy()
    second_best_margin(cost, sigma)
    assert np.array_equal(cost, copy)


SEEN = (0, 1, 3, 4, 5)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of 5 of 6 classes, tighter and looser ones, of every norm."""
    generator = torch.Generator().manual_seed(3)
    which = torch.randint(0, 5, (400,), generator=generator)
    centers = F.normalize(torch.randn(5, 4, generator=generator), dim=1)
    spread = torch.linspace(0.1, 0.9, 5)[which, None]
    features = centers[which] + spread * torch.randn(400, 4, generator=generator)
    return features * torch.rand(400, 1, generator=generator), torch.tensor(SEEN)[which]


def test_compactness_and_separation_are_those_of_the_features() -> None:
    features, labels = samples()
    statistic = ClassStatistic(6, 4)
    statistic.add(features, labels)
    points = torch.from_numpy(unit_rows(6, 4, 1)).float()
    result = match(statistic, points, torch.arange(6))
    assert result.diagnostics is not None
    found = result.diagnostics

    f = F.normalize(features.double(), dim=1).numpy()
    y = labels.numpy()
    means = {c: f[y == c].mean(0) for c in SEEN}
    directions = {c: mean / np.linalg.norm(mean) for c, mean in means.items()}
    own = {c: (f[y == c] @ directions[c]).mean() for c in SEEN}
    assert found.compactness == pytest.approx(np.mean(list(own.values())), abs=1e-6)
    assert found.loosest_class == min(own, key=lambda c: own[c]) > 2
    pairs = {(a, b): directions[a] @ directions[b] for a, b in itertools.combinations(SEEN, 2)}
    assert found.mean_cosine == pytest.approx(np.mean(list(pairs.values())), abs=1e-6)
    assert found.closest_classes == max(pairs, key=lambda pair: pairs[pair])
    assert found.closest_classes[1] > 2, "behind the class that was not seen"
    assert found.largest_cosine == pytest.approx(max(pairs.values()), abs=1e-6)
    assert set(found.metrics()) == {"margin", "compactness", "mean_class_cosine", "largest_class_cosine"}


def test_a_matching_names_the_labels_that_moved_and_what_it_gained() -> None:
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
    assert "seconds" not in metrics, "a metric that depends on the clock would differ after a resume"


def test_nothing_is_said_of_classes_that_were_not_seen() -> None:
    nothing = match(ClassStatistic(3, 2), torch.eye(3, 2), torch.arange(3)).diagnostics
    assert nothing is not None
    assert (nothing.compactness, nothing.mean_cosine, nothing.closest_classes) == (None, None, None)
    assert set(nothing.metrics()) == {"margin"}
    means = np.array([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0]])
    one = compute_diagnostics(means, np.array([2.0, 0.0, 1.0]))
    assert (one.compactness, one.loosest_class, one.largest_cosine) == (0.5, 0, None)
