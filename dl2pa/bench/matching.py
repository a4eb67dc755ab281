"""Time and memory of an assignment update, compared with dense solvers, for statistics like those of an untrained and a
trained network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from dl2pa.assignment import AssignmentSolver, ClassStatistic
from dl2pa.assignment.diagnostics import with_margin
from dl2pa.assignment.match import apply_assignment, is_main, reduce_statistics
from dl2pa.bench.group import run_in_group
from dl2pa.bench.memory import peak_gib, reset_peak, resident_gib

Floats = NDArray[np.float64]

STATES = ("untrained", "trained")
_SCIPY_CLASSES, _LAPX_CLASSES = 25_000, 10_000
"""Largest class counts for the dense solvers: SciPy takes a minute there; lapx takes over seven at 21,841."""
_ONE = 2.0**32
_PERTURBATION = 0.1
"""Length by which a row changes between two updates of a trained network."""


def bench_matching(class_counts: list[int], dim: int, rounds: int, nproc: int) -> list[dict[str, Any]]:
    """Measure assignment updates; return one row per class count and state with the fastest of `rounds`.

    Each class count runs in a new gloo group of `nproc` processes. Candidates are computed on a GPU if there is one.

    Returns:
        Rows of `classes dim state`, seconds `reduce_s candidates_s solve_s certificate_s broadcast_s insight_s
        update_s` (the update without the diagnostics, `insight_s`), `again_s` (a second solve after a small change of
        the rows, starting from the first solution), `scipy_s lapx_s` (dense solve including its cost matrix; null if
        not run or not installed), `rounds candidates gap` of the solve, `dense_gain` (relative excess of the dense
        solver's objective), and GiB `torch_gib peak_gib` of rank 0: before the inputs exist, and the peak during the
        update.
    """
    return [
        row
        for count in class_counts
        for row in run_in_group(nproc, 1, f"{count} classes", _rank, count, dim, rounds)
    ]


def _rank(count: int, dim: int, rounds: int) -> list[dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for state in STATES:
            row = _measure(count, dim, state)
            old = best.setdefault(state, row)
            for key, value in row.items():
                if key.endswith("_s") and value is not None:
                    old[key] = min(old[key], value)
    return list(best.values())


def _measure(count: int, dim: int, state: str) -> dict[str, Any]:
    """Measure the parts of one update, as in training."""
    torch_gib = resident_gib()
    statistic, points = _share_of_statistic(count, dim, state)
    sigma, solver = torch.arange(count), AssignmentSolver()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reset_peak()
    dist.barrier()
    reduced = reduce_statistics(statistic, points, sigma)
    rows, prototypes = statistic.rows.numpy(), points.double().numpy()
    start = time.perf_counter()
    solution = solver.solve(rows, prototypes, sigma.numpy().copy(), device) if is_main() else None
    solve_s = time.perf_counter() - start
    dist.barrier()
    result = apply_assignment(statistic.rows, points, sigma, reduced, solution)
    row: dict[str, Any] = {
        "classes": count,
        "dim": dim,
        "state": state,
        "reduce_s": reduced.seconds,
        "broadcast_s": result.seconds,
        "update_s": reduced.seconds + solve_s + result.seconds,
        "torch_gib": torch_gib,
        "peak_gib": peak_gib(),
    }
    if solution is not None:
        row |= {**solution.work(), "gap": solution.gap}
        row["insight_s"] = with_margin(reduced.diagnostics(), rows, prototypes, solution.assignment).seconds
        start = time.perf_counter()
        solver.solve(_perturb(rows), prototypes, solution.assignment, device)
        row["again_s"] = time.perf_counter() - start
        row |= _dense(rows, prototypes, solution.assignment)
    return row


def _dense(rows: Floats, points: Floats, sigma: NDArray[np.int64]) -> dict[str, float | None]:
    """Measure the dense solvers of SciPy and lapx on the centered cost."""
    result: dict[str, float | None] = {"scipy_s": None, "lapx_s": None, "dense_gain": None}
    for name, solve, limit in (("scipy_s", _scipy, _SCIPY_CLASSES), ("lapx_s", _lapx, _LAPX_CLASSES)):
        if len(rows) > limit:
            continue
        start = time.perf_counter()
        cost = (rows.mean(axis=0) - rows) @ (points - points.mean(axis=0)).T
        columns = solve(cost)
        if columns is not None:
            result[name] = time.perf_counter() - start
            sparse, dense = (cost[np.arange(len(cost)), c].sum() for c in (sigma, columns))
            result["dense_gain"] = float((sparse - dense) / max(abs(dense), 1e-300))
    return result


def _scipy(cost: Floats) -> NDArray[np.int64]:
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(cost)[1])


def _lapx(cost: Floats) -> NDArray[np.int64] | None:
    try:
        import lap
    except ImportError:
        return None
    solve: Callable[[Floats], Any] = lap.lapjv
    return np.asarray(solve(cost)[1], dtype=np.int64)


def _perturb(rows: Floats) -> Floats:
    noise = np.random.default_rng(1).standard_normal(rows.shape)
    return _unit(rows + _PERTURBATION / math.sqrt(rows.shape[1]) * noise)


def _share_of_statistic(count: int, dim: int, state: str) -> tuple[ClassStatistic, Tensor]:
    """Return this rank's part of a statistic with one sample per class, and the prototypes."""
    rows, points = rows_and_points(count, dim, state)
    statistic, share = ClassStatistic(count, dim), _ONE / dist.get_world_size()
    statistic.sums.copy_(torch.from_numpy(rows * share).round())
    statistic.counts.fill_(int(share))
    return statistic, torch.from_numpy(points).float()


def rows_and_points(count: int, dim: int, state: str) -> tuple[Floats, Floats]:
    """Return unit rows and prototypes: untrained, all rows near one direction; trained, each near another prototype."""
    generator = np.random.default_rng(count)
    points = _unit(generator.standard_normal((count, dim)))
    noise = _unit(generator.standard_normal((count, dim)))
    if state == "untrained":
        return _unit(_unit(generator.standard_normal((1, dim))) + 0.1 * noise), points
    return _unit(points[generator.permutation(count)] + 0.5 * noise), points


def _unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
