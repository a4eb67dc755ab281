"""Prototypes that move toward their classes under a bound on their largest cosine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dl2pa.assignment import nearest_code, refit
from dl2pa.geometry import build_prototypes


def random_rows(count: int, dim: int, seed: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, dtype=torch.float64, generator=generator)
    rows[:, 0] += offset
    return F.normalize(rows, dim=1)


def largest(rows: Tensor) -> float:
    return float((rows @ rows.T).fill_diagonal_(-1).max())


def mean_cosine(rows: Tensor, directions: Tensor) -> float:
    return float((rows * directions).sum(dim=1).mean())


def test_without_a_bound_the_rows_equal_the_directions() -> None:
    directions = random_rows(30, 6, 0, offset=2.0)
    moved = nearest_code(directions, random_rows(30, 6, 1), 1.0)
    assert mean_cosine(moved, directions) > 1 - 1e-6


@pytest.mark.parametrize("bound", [0.5, 0.7, 0.9])
def test_bound_is_met_and_the_result_is_near_that_of_lbfgs(bound: float) -> None:
    directions = random_rows(40, 8, 2, offset=2.0)
    assert largest(directions) > 0.9
    moved = nearest_code(directions, directions, bound)
    assert largest(moved) < bound + 2e-3
    assert torch.allclose(moved.norm(dim=1), torch.ones(40, dtype=torch.float64))
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
    assert mean_cosine(moved, directions) > mean_cosine(best, directions) - 5e-3


def test_rows_move_to_their_classes_unless_without_samples() -> None:
    points = build_prototypes(8, 12).points
    assignment = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    directions = F.normalize(points[assignment].double() + 0.3 * random_rows(8, 12, 3), dim=1)
    directions[5] = 0
    moved = points.clone()
    stayed = refit(moved, assignment, directions, 0.99)
    assert stayed == pytest.approx(float((points * moved).sum(dim=1).mean()), abs=1e-6)
    seen = [c for c in range(8) if c != 5]
    assert mean_cosine(moved[assignment[seen]].double(), directions[seen]) > 1 - 1e-4
    assert torch.allclose(moved[assignment[5]], points[assignment[5]], atol=1e-5)


def test_tight_bound_keeps_the_best_code() -> None:
    code = build_prototypes(30, 4).points.double()
    bound = largest(code) + 0.01
    moved = nearest_code(random_rows(30, 4, 4, offset=3.0), code, bound)
    assert largest(moved) < bound + 0.02
    assert mean_cosine(moved, code) < 0.9999, "it can rotate"
