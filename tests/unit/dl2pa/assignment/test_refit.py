"""Prototypes that follow their classes: near to them, and no closer to each other than asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dl2pa.assignment import nearest_code, refit
from dl2pa.geometry import build_prototypes


def random_rows(count: int, dim: int, seed: int, together: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, dtype=torch.float64, generator=generator)
    rows[:, 0] += together
    return F.normalize(rows, dim=1)


def largest(rows: Tensor) -> float:
    return float((rows @ rows.T).fill_diagonal_(-1).max())


def fit(rows: Tensor, directions: Tensor) -> float:
    return float((rows * directions).sum(dim=1).mean())


def test_without_a_bound_the_rows_reach_the_directions() -> None:
    directions = random_rows(30, 6, 0, together=2.0)
    found = nearest_code(directions, random_rows(30, 6, 1), 1.0)
    assert fit(found, directions) > 1 - 1e-6


@pytest.mark.parametrize("bound", [0.5, 0.7, 0.9])
def test_the_bound_holds_and_costs_as_little_as_another_optimizer_finds(bound: float) -> None:
    directions = random_rows(40, 8, 2, together=2.0)
    assert largest(directions) > 0.9
    found = nearest_code(directions, directions, bound)
    assert largest(found) < bound + 2e-3
    assert torch.allclose(found.norm(dim=1), torch.ones(40, dtype=torch.float64))
    rows = directions.clone().requires_grad_()
    for weight in (1.0, 10.0, 100.0, 1000.0):  # the same penalty by autograd and L-BFGS
        solver = torch.optim.LBFGS([rows], max_iter=300, line_search_fn="strong_wolfe")

        def closure(weight: float = weight, solver: torch.optim.Optimizer = solver) -> Tensor:
            solver.zero_grad()
            unit = F.normalize(rows, dim=1)
            excess = (unit @ unit.T - 2 * torch.eye(40, dtype=torch.float64) - bound).clamp(min=0)
            loss = (1 - (unit * directions).sum(dim=1)).sum() + weight * excess.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
    best = F.normalize(rows.detach(), dim=1)
    assert largest(best) < bound + 2e-3
    assert fit(found, directions) > fit(best, directions) - 5e-3


def test_rows_follow_their_own_class_and_an_unseen_class_pulls_at_nothing() -> None:
    points = build_prototypes(8, 12).points
    assignment = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    directions = F.normalize(points[assignment].double() + 0.3 * random_rows(8, 12, 3), dim=1)
    directions[5] = 0
    moved = points.clone()
    stayed = refit(moved, assignment, directions, 0.99)
    assert stayed == pytest.approx(float((points * moved).sum(dim=1).mean()), abs=1e-6)
    seen = [c for c in range(8) if c != 5]
    assert fit(moved[assignment[seen]].double(), directions[seen]) > 1 - 1e-4
    assert torch.allclose(moved[assignment[5]], points[assignment[5]], atol=1e-5)


def test_hardly_any_room_leaves_the_best_code_about_where_it_stands() -> None:
    code = build_prototypes(30, 4).points.double()
    bound = largest(code) + 0.01
    found = nearest_code(random_rows(30, 4, 4, together=3.0), code, bound)
    assert largest(found) < bound + 0.02
    assert fit(found, code) < 0.9999, "it may still turn as a whole"
