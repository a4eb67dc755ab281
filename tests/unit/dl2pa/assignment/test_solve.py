"""The exact solver: equal to brute force and SciPy's dense solver, and a function of its arguments only."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from dl2pa.assignment import AssignmentSolver, scores, solve_assignment
from dl2pa.assignment.bipartite import Graph, match_rows
from dl2pa.assignment.scores import Limits, ScoreSearch
from dl2pa.assignment.solve import ALL_PAIRS, QUANTUM

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

KINDS = (
    "random",
    "shared direction",
    "clustered",
    "duplicated rows",
    "nearly equal rows",
    "unseen classes",
    "unseen, shared direction",
    "low rank",
    "ties everywhere",
    "equal rows",
    "near prototypes",
    "equal prototypes",
)


def unit_rows(count: int, dim: int, seed: int) -> Floats:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def problem(kind: str, count: int, dim: int, seed: int) -> tuple[Floats, Floats, Integers]:
    """Rows, prototypes and current assignment of a problem."""
    random = np.random.default_rng(seed)
    rows, points = unit_rows(count, dim, seed), unit_rows(count, dim, seed + 10_000)
    if kind in ("shared direction", "unseen, shared direction"):
        rows = unit_rows(1, dim, seed + 1) + 0.1 * rows
    if kind == "clustered":
        rows = unit_rows(5, dim, seed + 1)[random.integers(0, 5, count)] + 0.05 * rows
    if kind == "nearly equal rows":
        rows = rows[random.integers(0, max(1, count // 4), count)] + 1e-8 * rows
    if kind == "duplicated rows":
        rows = rows[random.integers(0, max(1, count // 2), count)]
    if kind.startswith("unseen"):
        rows[random.permutation(count)[: count // 3 + 1]] = 0.0
    if kind == "low rank":
        rows[:, 1:] = 0.0
    if kind == "ties everywhere":
        rows, points = (np.sign(part) * (np.abs(part) > 0.3) for part in (rows, points))
    if kind == "equal rows":
        rows[:] = rows[0]
    if kind == "near prototypes":
        rows = points[random.permutation(count)] + 0.3 * rows
    if kind == "equal prototypes":
        points = points[random.integers(0, max(1, count // 2), count)]
    return rows, points, random.permutation(count)


def objective(rows: Floats, points: Floats, sigma: Integers) -> float:
    return float((rows * points[sigma]).sum())


@given(classes=st.integers(2, 6), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_result_is_the_best_of_all_permutations(classes: int, seed: int) -> None:
    rows, points = unit_rows(classes, 3, seed), unit_rows(classes, 3, seed + 100)
    sigma = solve_assignment(rows, points)
    assert sorted(sigma.tolist()) == list(range(classes))
    every = (np.array(p) for p in itertools.permutations(range(classes)))
    assert objective(rows, points, sigma) == pytest.approx(max(objective(rows, points, p) for p in every))


@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(2, 600),
    dim=st.sampled_from([2, 3, 10, 64]),
    seed=st.integers(0, 2**16),
)
@example(kind="ties everywhere", count=204, dim=10, seed=204)  # a rounded score once depended on the path
@settings(max_examples=30, deadline=None)
def test_result_equals_the_dense_solver_for_any_candidates(
    kind: str, count: int, dim: int, seed: int
) -> None:
    """8, 32 and 128 candidates and the complete graph give the same permutation."""
    rows, points, current = problem(kind, count, dim, seed)
    cost = (rows.mean(axis=0) - rows) @ (points - points.mean(axis=0)).T
    best = -cost[linear_sum_assignment(cost)].sum()
    complete = AssignmentSolver(all_pairs=count).solve(rows, points, current)
    assert sorted(complete.assignment.tolist()) == list(range(count))
    assert -cost[np.arange(count), complete.assignment].sum() == pytest.approx(best, abs=count * QUANTUM)
    for candidates in (8, 32, 128):
        sparse = AssignmentSolver(candidates, all_pairs=0).solve(rows, points, current)
        assert np.array_equal(sparse.assignment, complete.assignment), candidates
        assert 0.0 <= sparse.gap <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_search_order_and_precision_do_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and float32 noise, as on another device, change the search but not the result."""
    rows, points, current = problem(kind, 400, 16, 5)
    expected = AssignmentSolver(all_pairs=0).solve(rows, points, current).assignment
    product = scores._product
    noise = torch.Generator().manual_seed(0)

    def noisy(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        exact = product(one, other)
        size = 2.0**-24 * one.norm(dim=1)[:, None] * other.norm(dim=1)
        return exact + size * (2 * torch.rand(exact.shape, generator=noise) - 1)

    monkeypatch.setattr(scores, "_product", noisy)
    monkeypatch.setitem(scores._TILE, "cpu", 64)
    assert np.array_equal(AssignmentSolver(all_pairs=0).solve(rows, points, current).assignment, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_solves_do_not_change_the_result(kind: str) -> None:
    """The rows drift, then jump, and classes get their first samples."""
    rows, points, current = problem(kind, 300, 16, 7)
    solver = AssignmentSolver(all_pairs=0)
    for step, size in enumerate((0.0, 0.001, 0.01, 2.0, 0.0)):
        change = np.random.default_rng(step).standard_normal(rows.shape)
        rows = rows + size * change * (rows.any(axis=1, keepdims=True) | (step == 3))
        fresh = AssignmentSolver(all_pairs=0).solve(rows, points, current).assignment
        current = solver.solve(rows, points, current).assignment
        assert np.array_equal(current, fresh), step


def test_second_solve_of_a_trained_network_needs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, points, current = problem("near prototypes", 2 * ALL_PAIRS, 64, 0)
    solver = AssignmentSolver()
    first = solver.solve(rows, points, current)

    def fail(*_: object) -> None:
        raise AssertionError("all pairs were searched")

    monkeypatch.setattr(ScoreSearch, "largest", fail)
    again = solver.solve(rows + 0.001 * unit_rows(*rows.shape, 1), points, first.assignment)
    assert np.array_equal(again.assignment, first.assignment)
    with pytest.raises(AssertionError, match="searched"):
        solver.solve(rows, -points, first.assignment)


def test_search_returns_every_pair_above_the_thresholds() -> None:
    rows, points, _ = problem("clustered", 500, 8, 3)
    rows -= rows.mean(axis=0)
    search = ScoreSearch(rows, points, np.zeros(8), torch.device("cpu"))
    exact = rows @ points.T
    first, second, limits = search.largest(16)
    left_out = np.ones(exact.shape, dtype=bool)
    left_out[first, second] = False
    assert 8 < len(first) / 500 < 100
    assert (exact <= limits.rows[:, None]).all(where=left_out)
    assert (exact <= limits.columns).all(where=left_out)
    random = np.random.default_rng(0)
    row_values, column_values = 0.3 + 0.1 * random.random(500), 0.2 * random.random(500)
    unlimited = Limits(np.full(500, np.inf), np.full(500, np.inf))
    for bounds in (limits, unlimited):
        pairs = search.above(row_values, column_values, bounds)
        assert pairs is not None
        expected = exact > row_values[:, None] + column_values
        if bounds is limits:
            expected &= left_out
        assert set(zip(*map(np.ndarray.tolist, np.nonzero(expected)), strict=True)) <= set(
            zip(pairs[0].tolist(), pairs[1].tolist(), strict=True)
        )
        assert expected.any()
    assert search.above(row_values, column_values, unlimited, max_share=0.5) is None


def test_no_array_of_all_pairs_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tiles nor edges grow with C²."""
    rows, points, current = problem("shared direction", 3000, 16, 0)
    largest = 0
    product, build = scores._product, Graph.of

    def record_product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(one) * len(other))
        return product(one, other)

    def record_edges(shape: tuple[int, int], edges: Integers, columns: Integers) -> Graph:
        nonlocal largest
        largest = max(largest, len(edges))
        return build(shape, edges, columns)

    monkeypatch.setattr(scores, "_product", record_product)
    monkeypatch.setattr(Graph, "of", record_edges)
    monkeypatch.setitem(scores._TILE, "cpu", 256)
    AssignmentSolver().solve(rows, points, current)
    assert 3000 < largest < 3000 * 300


def test_result_is_optimal_with_more_ties_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "_MAX_PAIRS", 100)
    monkeypatch.setattr(scores, "_MAX_PAIRS_PER_ROW", 1)
    rows, points, current = problem("ties everywhere", 400, 16, 5)
    cost = -rows @ points.T
    sigma = AssignmentSolver(all_pairs=0).solve(rows, points, current).assignment
    assert cost[np.arange(400), sigma].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum())


@pytest.mark.parametrize("seed", range(3))
def test_rows_with_a_shared_direction_are_matched_exactly(seed: int) -> None:
    """As in an untrained network; subtracting the mean must not change the optimum."""
    rows = unit_rows(6, 3, seed) * 1e-3 + np.array([5.0, -2.0, 1.0])
    points = unit_rows(6, 3, seed + 10) + 0.7
    every = (np.array(p) for p in itertools.permutations(range(6)))
    best = max(every, key=lambda p: objective(rows, points, p))
    assert solve_assignment(rows, points).tolist() == best.tolist()


@pytest.mark.parametrize(("classes", "dim"), [(100, 10), (300, 64)])
def test_planted_permutation_is_recovered(classes: int, dim: int) -> None:
    points = unit_rows(classes, dim, 0)
    planted = np.random.default_rng(1).permutation(classes)
    assert solve_assignment(points[planted], points).tolist() == planted.tolist()
    noisy = points[planted] + 0.05 * unit_rows(classes, dim, 2)
    assert solve_assignment(noisy, points).tolist() == planted.tolist()


def test_classes_without_samples_keep_or_get_a_free_prototype() -> None:
    points = unit_rows(8, 4, 0)
    rows = points[[3, 1, 7, 0, 2, 4, 5, 6]].copy()
    rows[[2, 5, 6]] = 0.0
    current = np.array([0, 1, 3, 2, 6, 4, 5, 7])
    sigma = solve_assignment(rows, points, current)
    assert sigma[[0, 1, 3, 4, 7]].tolist() == [3, 1, 0, 2, 6]
    assert sigma[[5, 6]].tolist() == [4, 5], "kept"
    assert sigma[2] == 7, "the free one"


@pytest.mark.parametrize("kind", ["equal rows", "ties everywhere", "duplicated rows"])
def test_fewest_moves_are_selected_among_equal_assignments(kind: str) -> None:
    rows, points, current = problem(kind, 40, 3, 0)
    first = solve_assignment(rows, points, current)
    assert np.array_equal(solve_assignment(rows, points, first), first), "an optimum stays"
    if kind == "equal rows":
        assert np.array_equal(first, current)


def test_no_samples_keep_the_assignment() -> None:
    current = np.array([2, 0, 1])
    assert np.array_equal(solve_assignment(np.zeros((3, 2)), unit_rows(3, 2, 0), current), current)


def test_inputs_are_not_modified() -> None:
    rows, points = unit_rows(5, 3, 0), unit_rows(5, 3, 1)
    copies = rows.copy(), points.copy()
    solve_assignment(rows, points)
    assert np.array_equal(rows, copies[0])
    assert np.array_equal(points, copies[1])


def test_potentials_prove_the_minimum_weight() -> None:
    random = np.random.default_rng(0)
    for rows, columns in ((30, 30), (20, 35)):
        kept = random.random((rows, columns)) < 0.4
        kept[np.arange(rows), np.arange(rows)] = True
        graph = Graph.of((rows, columns), *np.nonzero(kept))
        weights = random.integers(-50, 50, len(graph.rows)).astype(np.float64)
        matched = match_rows(graph, weights, np.arange(rows))
        dense = np.full((rows, columns), 1e9)
        dense[graph.edges] = weights
        assert matched.weight == dense[linear_sum_assignment(dense)].sum()
        assert matched.weight == dense[np.arange(rows), matched.columns].sum()
        assert (matched.slack(graph, weights) >= 0).all()
        again = match_rows(graph, weights, matched.columns, matched)
        assert again.weight == matched.weight
