"""Combinations of known codes, and `auto`, which is never worse than `known` or `max_cosine`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dl2pa.errors import UserError
from dl2pa.geometry import build_prototypes
from dl2pa.geometry.known import best_combination, build_combination, spread_subset
from dl2pa.geometry.optimize import Plan, Stage

SHORT = Plan(1, Stage(60, 3.0, 1e4, 0.1, 3e-4), Stage(20, 1e4, 1e6, 1e-4, 1e-6))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the number of optimizer steps."""
    monkeypatch.setattr("dl2pa.geometry.optimize.plan_for", lambda *_: SHORT)


@pytest.mark.parametrize(
    ("num_classes", "dim", "construction", "cosine"),
    [
        (100, 22, "known: Higman-Sims (100x22)", 1 / 11),
        (100, 25, "known: Higman-Sims (100x22)", 1 / 11),
        (104, 24, "known: Higman-Sims (100x22) + blocks (4x2)", 1 / 11),
        (200, 44, "known: Higman-Sims (100x22) + Higman-Sims (100x22)", 1 / 11),
        (100, 16, "known: 100 of Nordstrom-Robinson shortened 1x (128x15)", 1 / 5),
        (200, 25, "known: 200 of 276 equiangular lines derived 1x (275x22)", 1 / 6),
        (200, 50, "known: 200 of quadrangle GQ(4,16) derived 2x (204x50)", 1 / 18),
        (1000, 100, "known: 1000 of Kerdock 64 shortened 2x (1024x62)", 6 / 62),
        (4224, 64, "known: Kerdock 64 with axes (4224x64)", 1 / 8),
    ],
)
def test_best_combination(num_classes: int, dim: int, construction: str, cosine: float) -> None:
    built = build_prototypes(num_classes, dim, "known")
    assert built.certificate.construction == construction
    assert built.points.shape == (num_classes, dim)
    assert built.certificate.max_cosine == pytest.approx(cosine, abs=1e-6)
    assert torch.allclose(built.points.norm(dim=1), torch.ones(num_classes), atol=1e-6)
    assert built.certificate.mean_norm < 0.02


def test_more_dimensions_never_make_a_combination_worse() -> None:
    cosines = [combination.cosine for d in range(8, 121) if (combination := best_combination(250, d))]
    assert cosines == sorted(cosines, reverse=True)


@pytest.mark.parametrize(("num_classes", "dim"), [(130, 30), (333, 77), (601, 150), (101, 45)])
def test_direct_sum_has_c_points_within_its_cosine(num_classes: int, dim: int) -> None:
    combination = best_combination(num_classes, dim)
    assert combination is not None
    assert sum(combination.counts) == num_classes
    points = build_combination(combination, dim, seed=0)
    gram = (points @ points.T).fill_diagonal_(-1.0)
    assert float(gram.max()) <= combination.cosine + 1e-9
    assert torch.unique(points, dim=0).shape == (num_classes, dim)


def test_subset_is_balanced_and_does_not_depend_on_the_seed() -> None:
    rows = np.random.default_rng(3).normal(size=(400, 9))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    chosen = spread_subset(rows, 120, seed=0)
    assert len(np.unique(chosen, axis=0)) == 120
    assert np.linalg.norm(chosen.mean(axis=0)) < 0.02 < np.linalg.norm(rows[:120].mean(axis=0))
    assert np.array_equal(chosen, spread_subset(rows, 120, seed=1))


def test_known_is_optimal_or_rejected() -> None:
    assert build_prototypes(10, 20, "known").certificate.construction == "simplex"
    assert build_prototypes(30, 20, "known").certificate.construction == "blocks"
    with pytest.raises(UserError, match="known codes with enough points; got num_classes = 1000, dim = 5"):
        build_prototypes(1000, 5, "known")


def test_auto_selects_an_optimal_code_without_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dl2pa.geometry.optimize.minimize_max_cosine", lambda *_: pytest.fail("searched"))
    for num_classes, dim in ((275, 22), (112, 21), (21_841, 512)):
        assert build_prototypes(num_classes, dim).certificate.construction.startswith("known: ")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("num_classes", "dim"), [(100, 16), (100, 25), (100, 32), (200, 51), (60, 8), (60, 3)]
)
def test_auto_is_never_worse_than_known_or_the_optimizer(num_classes: int, dim: int) -> None:
    auto = build_prototypes(num_classes, dim).certificate.max_cosine
    assert auto <= build_prototypes(num_classes, dim, "max_cosine").certificate.max_cosine + 1e-6
    if best_combination(num_classes, dim) is not None:
        assert auto <= build_prototypes(num_classes, dim, "known").certificate.max_cosine + 1e-6


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("num_classes", "dim"),
    [(100, 16), (100, 32), (60, 5), pytest.param(1000, 70, marks=pytest.mark.thorough)],
)
def test_auto_is_deterministic_for_a_seed(num_classes: int, dim: int) -> None:
    first, again = (build_prototypes(num_classes, dim, seed=4).points for _ in range(2))
    assert first.numpy().tobytes() == again.numpy().tobytes()


@pytest.mark.usefixtures("short")
def test_progress_of_auto_reaches_the_total() -> None:
    calls: list[tuple[int, int]] = []
    build_prototypes(100, 16, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len({total for _, total in calls}) == 1 and calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize(
    ("num_classes", "dim", "target"),
    [
        (100, 10, 0.335),
        pytest.param(100, 16, 1 / 5, marks=pytest.mark.thorough),
        pytest.param(100, 25, 1 / 11, marks=pytest.mark.thorough),
        pytest.param(100, 32, 0.078, marks=pytest.mark.thorough),
        pytest.param(200, 25, 1 / 6, marks=pytest.mark.thorough),
        pytest.param(200, 50, 0.077, marks=pytest.mark.thorough),
    ],
)
def test_auto_reaches_the_targets_that_need_a_search(num_classes: int, dim: int, target: float) -> None:
    assert build_prototypes(num_classes, dim).certificate.max_cosine <= target + 1e-6
