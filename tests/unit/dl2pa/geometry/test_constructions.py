"""Prototype constructions: cosines, determinism and rejected input."""

from __future__ import annotations

import math

import pytest
import torch

from dl2pa.errors import UserError
from dl2pa.geometry import CONSTRUCTIONS, build_prototypes
from dl2pa.geometry.objectives import ebv_threshold, steps_for
from dl2pa.geometry.optimize import Plan, Stage, minimize_max_cosine, pair_pull, plan_for, random_points

SHORT = Plan(2, Stage(300, 3.0, 1e4, 0.1, 3e-4), Stage(50, 1e4, 1e6, 1e-4, 1e-6))


def cosines(points: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs i < j, float64."""
    count = points.shape[0]
    gram = points.double() @ points.double().T
    return gram[torch.triu(torch.ones(count, count), diagonal=1).bool()]


def test_simplex_is_regular_and_its_unused_dimensions_are_zero() -> None:
    built = build_prototypes(10, 64)
    assert built.certificate.construction == "simplex"
    assert torch.allclose(cosines(built.points), torch.tensor(-1 / 9, dtype=torch.float64), atol=1e-6)
    assert built.certificate.max_cosine == pytest.approx(-1 / 9, abs=1e-6)
    assert built.certificate.lower_bound == -1 / 9
    assert not built.points[:, 9:].any()


@pytest.mark.parametrize(("num_classes", "dim"), [(1000, 512), (100, 50), (11, 7), (4, 2), (6, 4)])
def test_auto_has_cosine_exactly_zero_for_c_up_to_2d(num_classes: int, dim: int) -> None:
    built = build_prototypes(num_classes, dim)
    assert built.certificate.construction == "blocks"
    assert built.certificate.max_cosine == 0.0
    assert math.copysign(1.0, built.certificate.max_cosine) == 1.0
    assert built.certificate.lower_bound == 0.0
    assert built.points.shape == (num_classes, dim)


@pytest.mark.parametrize(
    ("construction", "dim"),
    [("simplex", 9), ("simplex", 30), ("kasarla", 9), ("kasarla", 14), ("etf", 10), ("etf", 17)],
)
def test_every_simplex_construction_is_regular(construction: str, dim: int) -> None:
    built = build_prototypes(10, dim, construction, seed=3)
    assert built.points.shape == (10, dim)
    assert torch.allclose(cosines(built.points), torch.tensor(-1 / 9, dtype=torch.float64), atol=1e-6)


def test_kasarla_equals_the_published_recursion() -> None:
    columns = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    for k in range(2, 7):
        row = torch.cat([torch.ones(1, 1), torch.full((1, k), -1 / k)], dim=1).double()
        lower = torch.cat([torch.zeros(k - 1, 1).double(), math.sqrt(1 - 1 / k**2) * columns], dim=1)
        columns = torch.cat([row, lower])
    assert torch.allclose(build_prototypes(7, 6, "kasarla").points, columns.T.float(), atol=1e-6)


def test_auto_is_the_regular_polygon_for_d_2() -> None:
    certificate = build_prototypes(7, 2).certificate
    assert certificate.construction == "polygon"
    assert certificate.max_cosine == pytest.approx(math.cos(2 * math.pi / 7), abs=1e-6)
    assert certificate.max_cosine == pytest.approx(certificate.lower_bound, abs=1e-6)


def test_two_classes_in_one_dimension() -> None:
    built = build_prototypes(2, 1)
    assert built.certificate.max_cosine == -1.0


@pytest.mark.parametrize(("num_classes", "dim", "best"), [(12, 3, 0.4472136), (16, 5, 0.2), (27, 6, 0.25)])
def test_max_cosine_finds_small_optimal_codes(num_classes: int, dim: int, best: float) -> None:
    """The icosahedron, the Clebsch code and the Schläfli code are proven optimal."""
    plan = Plan(8, Stage(1200, 3.0, 1e4, 0.1, 3e-4), Stage(300, 1e4, 1e6, 1e-4, 1e-6))
    points = minimize_max_cosine(num_classes, dim, seed=0, plan=plan)
    assert float(cosines(points).max()) == pytest.approx(best, abs=1e-4)


def test_max_cosine_is_better_than_the_compared_objectives() -> None:
    """At 100×25 it reaches 0.1110 in seconds; the DL2PA authors' command reaches 0.377."""
    plan = Plan(1, Stage(2000, 3.0, 1e4, 0.1, 3e-4), Stage(300, 1e4, 1e6, 1e-4, 1e-6))
    assert float(cosines(minimize_max_cosine(100, 25, seed=0, plan=plan)).max()) < 0.1115


def test_pair_pull_in_blocks_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    points = random_points(50, 8, seed=1, starts=2)
    for beta in (3.0, 1e5):
        expected = pair_pull(points, beta)
        monkeypatch.setattr("dl2pa.geometry.certificate.BLOCK_ELEMENTS", 2 * 50 * 7)
        assert torch.allclose(pair_pull(points, beta), expected, atol=1e-6)
        monkeypatch.undo()


def test_pair_pull_is_half_the_gradient_of_log_sum_exp() -> None:
    points = random_points(9, 4, seed=2)[0].double().requires_grad_()
    beta = 6.0
    gram = (points @ points.T).masked_fill(torch.eye(9).bool(), -math.inf)
    (torch.logsumexp(beta * gram.flatten(), 0) / beta).backward()
    assert points.grad is not None
    assert torch.allclose(2 * pair_pull(points.detach()[None], beta)[0], points.grad)


def test_large_problems_have_fewer_steps_but_at_least_100() -> None:
    assert plan_for(100, 10).starts > 1
    assert plan_for(21_841, 512).starts == 1
    assert 100 <= plan_for(21_841, 512).anneal.steps < plan_for(1000, 10).anneal.steps
    assert steps_for(100, 10) == steps_for(1000, 10) == 10_000
    assert 100 <= steps_for(21_841, 512) < steps_for(1000, 512) < 10_000


@pytest.mark.parametrize("construction", ["uniformity", "hpn", "ebv"])
def test_compared_objectives_spread_points_and_use_the_seed(construction: str) -> None:
    first = build_prototypes(20, 5, construction, seed=1)
    again = build_prototypes(20, 5, construction, seed=1)
    other = build_prototypes(20, 5, construction, seed=2)
    assert torch.equal(first.points, again.points)
    assert not torch.equal(first.points, other.points)
    assert torch.allclose(first.points.norm(dim=1), torch.ones(20), atol=1e-6)
    assert first.certificate.max_cosine < float(cosines(random_points(20, 5, seed=1)[0]).max())


def test_hpn_reaches_its_expected_cosine() -> None:
    """0.125 at 100×25; the DL2PA authors' prototypes have 0.377, max_cosine has 0.110."""
    assert 0.11 < build_prototypes(100, 25, "hpn").certificate.max_cosine < 0.14


def test_ebv_cosines_are_below_the_threshold() -> None:
    built = build_prototypes(40, 40, "ebv")
    assert float(cosines(built.points).abs().max()) <= ebv_threshold(40, 40) + 1e-4


def test_ebv_threshold_equals_the_published_values() -> None:
    assert ebv_threshold(1000, 1000) == 0.002
    assert ebv_threshold(1000, 512) == pytest.approx(0.05, abs=0.001)
    assert 0.6 < ebv_threshold(1000, 10) < 1.0


@pytest.mark.parametrize("construction", ["max_cosine", "etf"])
def test_points_are_a_function_of_the_seed(construction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dl2pa.geometry.optimize.plan_for", lambda *_: SHORT)
    dim = 12 if construction == "etf" else 4
    first = build_prototypes(12, dim, construction, seed=5)
    again = build_prototypes(12, dim, construction, seed=5)
    other = build_prototypes(12, dim, construction, seed=6)
    assert torch.equal(first.points, again.points)
    assert not torch.equal(first.points, other.points)


def test_small_problems_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dl2pa.geometry.optimize.plan_for", lambda *_: SHORT)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = build_prototypes(60, 8, "max_cosine")
        torch.set_num_threads(2)
        two = build_prototypes(60, 8, "max_cosine")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.points, two.points)


def test_progress_counts_up_to_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dl2pa.geometry.optimize.plan_for", lambda *_: SHORT)
    calls: list[tuple[int, int]] = []
    build_prototypes(12, 4, "max_cosine", progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (350, 350)


@pytest.mark.parametrize(
    ("num_classes", "dim", "field"), [(1, 5, "num_classes"), (10, 0, "dim"), (3, 1, "dim")]
)
def test_impossible_shapes_are_rejected(num_classes: int, dim: int, field: str) -> None:
    for construction in CONSTRUCTIONS:
        with pytest.raises(UserError) as caught:
            build_prototypes(num_classes, dim, construction)
        assert caught.value.field == field, construction


def test_remedy_for_three_classes_in_one_dimension() -> None:
    with pytest.raises(UserError, match="Choose dim >= 2"):
        build_prototypes(3, 1)


@pytest.mark.parametrize(
    ("construction", "num_classes", "dim", "message"),
    [
        ("simplex", 10, 8, "dim >= num_classes - 1"),
        ("blocks", 21, 10, "2 * dim"),
        ("blocks", 10, 10, "dim < num_classes"),
        ("polygon", 9, 3, "dim = 2"),
        ("kasarla", 10, 8, "dim >= num_classes - 1"),
        ("etf", 10, 9, "dim >= num_classes"),
        ("hpn", 2, 1, "dim >= 2"),
        ("max_cosine", 2, 1, "dim >= 2"),
        ("triangle", 10, 5, "unknown construction"),
    ],
)
def test_undefined_constructions_are_rejected_with_a_remedy(
    construction: str, num_classes: int, dim: int, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        build_prototypes(num_classes, dim, construction)
    assert caught.value.field == "method.prototypes"
    assert caught.value.value == construction
    assert message in caught.value.message
    assert "auto" in caught.value.remedy
