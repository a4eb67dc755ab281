from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dl2pa.assignment import ClassStatistic, match


def points(classes: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(classes, dim, generator=torch.Generator().manual_seed(3)), dim=1)


def statistic_of(features: Tensor, labels: Tensor) -> ClassStatistic:
    statistic = ClassStatistic(int(labels.max()) + 1, features.shape[1])
    statistic.add(features, labels)
    return statistic


def test_update_reports_its_result() -> None:
    prototypes = points(6, 3)
    planted = torch.tensor([1, 0, 2, 5, 3, 4])
    statistic = statistic_of(7.0 * prototypes[planted], torch.arange(6))
    sigma = torch.arange(6)
    result = match(statistic, prototypes, sigma)
    assert torch.equal(sigma, planted)
    assert result.moved == 5
    assert result.classes_seen == 6
    before = float((prototypes[planted] * prototypes).sum())
    assert result.objective_before == pytest.approx(before, abs=1e-6)
    assert result.objective_after == pytest.approx(6.0, abs=1e-6)
    assert result.own_cosine == pytest.approx(before / 6, abs=1e-6)


def test_update_resets_the_statistic_and_keeps_the_rows() -> None:
    prototypes, sigma = points(6, 3), torch.arange(6)
    planted = torch.tensor([1, 0, 2, 5, 3, 4])
    statistic = statistic_of(prototypes[planted], torch.arange(6))
    match(statistic, prototypes, sigma)
    statistic.add(prototypes[[4]], torch.tensor([5]))  # the other classes keep their rows
    result = match(statistic, prototypes, sigma)
    assert result.classes_seen == 1
    assert result.moved == 0
    assert torch.equal(sigma, planted)


def test_own_cosine_is_a_mean_over_samples() -> None:
    prototypes = torch.eye(2)
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    result = match(statistic_of(features, torch.tensor([0, 0, 0, 1])), prototypes, torch.arange(2))
    assert result.own_cosine == pytest.approx(3 / 4)


def test_update_without_samples() -> None:
    """All rows are zero: every permutation is optimal and the metrics are finite."""
    sigma = torch.arange(4)
    result = match(ClassStatistic(4, 3), points(4, 3), sigma)
    assert sorted(sigma.tolist()) == [0, 1, 2, 3]
    assert (result.classes_seen, result.own_cosine, result.objective_after) == (0, 0.0, 0.0)


def test_permuting_a_simplex_is_an_isometry() -> None:
    """The reason for the warning at d >= C - 1: all assignments are equivalent for a symmetric network."""
    simplex = F.normalize(torch.eye(4) - 0.25, dim=1)
    gram = simplex @ simplex.T
    for permutation in itertools.permutations(range(4)):
        assert torch.allclose(simplex[list(permutation)] @ simplex[list(permutation)].T, gram, atol=1e-6)
